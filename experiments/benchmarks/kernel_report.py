"""Times of kernels as a table and as a picture."""

import collections
import pathlib
from typing import Any

from experiments.benchmarks import measure

Row = dict[str, Any]

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "triton")
TITLES = {"forward": "forward", "gradient": "forward + backward", "decode": "one step"}
# Section -> unit, its size, the axis of the sizes, and what that axis is.
SECTIONS = {
    "mlstm": ("ms", 1e3, "T", "sequence length"),
    "slstm": ("µs per step", 1e6, "K", "head dimension"),
    "decode": ("µs", 1e6, "B", "batch size"),
}


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide how fast a kernel is."""
    return measure.versions(PACKAGES)


def section(row: Row) -> str:
    """A key of `SECTIONS`."""
    return "decode" if row["part"] == "decode" else row["op"]


def value(row: Row, seconds: str = "median_seconds") -> float:
    """A time in the unit of the row's section: of a call, or of one step of an sLSTM."""
    steps = row["T"] if row["op"] == "slstm" else 1
    return row[seconds] / steps * SECTIONS[section(row)][1]


def panels(rows: list[Row]) -> dict[tuple[str, str, str], dict[str, list[Row]]]:
    """Rows by section, heads and part, and within by candidate, in their order."""
    found: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        dims = "" if row["op"] == "slstm" else f" x ({row['K']}, {row['V']})"
        panel = found.setdefault((section(row), f"{row['H']}{dims}", row["part"]), {})
        panel.setdefault(row["candidate"], []).append(row)
    return found


def caption(result: dict[str, Any]) -> str:
    """On what, with what and when."""
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    driver = result["driver"].get("driver_version")
    device = result["device"] + (f", driver {driver}" if driver else "")
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in result["rows"]))
    return f"{device}; {packages}; {dtypes}; {result['date'][:10]}"


def table(result: dict[str, Any]) -> str:
    """Markdown: per panel a line per candidate and a column per size; then what did not run."""
    lines = [f"{caption(result)}. Medians; share of the bound; peak memory.", ""]
    for (kind, heads, part), candidates in panels(result["rows"]).items():
        unit, _, axis, _ = SECTIONS[kind]
        sizes = dict.fromkeys(row[axis] for rows in candidates.values() for row in rows)
        header = [f"{kind} {heads}, {TITLES[part]}, {unit}", *(f"{axis}={n}" for n in sizes)]
        body = []
        for candidate, rows in candidates.items():
            cells = {row[axis]: _cell(row) for row in rows}
            if any(cells.values()):
                body.append([candidate, *(cells.get(size) or "-" for size in sizes)])
        lines += [measure.table(header, body), ""]
    reasons = collections.Counter(
        f"`{row['candidate']}`, {section(row)}: {row.get('skipped') or row['error']}"
        for row in result["rows"]
        if "skipped" in row or "error" in row
    )
    missing = [f"- {what} ({count} case{'s' * (count > 1)})" for what, count in reasons.items()]
    return "\n".join([*lines, *(["Not run:", "", *missing] if missing else [])]) + "\n"


def _cell(row: Row) -> str:
    """A time with share and memory; empty for what did not run."""
    if "median_seconds" not in row:
        return ""
    extra = []
    if "share_of_bound" in row and section(row) != "slstm":
        extra.append(f"{row['share_of_bound']:.0%}")
    if size := row.get("peak_bytes"):
        extra.append(f"{size / 1e9:.2g} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB")
    return f"{value(row):.3g}" + (f" ({', '.join(extra)})" if extra else "")


def picture(result: dict[str, Any], path: pathlib.Path) -> None:
    """A panel per section, heads and part; both axes are logarithmic."""
    from matplotlib.figure import Figure

    timed = [row for row in result["rows"] if "median_seconds" in row]
    drawn = panels(timed)
    if not drawn:
        return
    lines = -(-len(drawn) // 2)
    figure = Figure(figsize=(10, 0.7 + 3.1 * lines), dpi=100, layout="constrained")
    figure.suptitle(caption(result), fontsize=8)
    colors = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(r["candidate"] for r in timed))}
    for number, (key, candidates) in enumerate(drawn.items()):
        _panel(figure.add_subplot(lines, 2, number + 1), key, candidates, colors)
    figure.savefig(path)


def _panel(
    axes: Any, key: tuple[str, str, str], candidates: dict[str, list[Row]], colors: dict[str, str]
) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    kind, heads, part = key
    unit, _, axis, words = SECTIONS[kind]
    bounds: dict[int, float] = {}
    for candidate, rows in candidates.items():
        times = [row[axis] for row in rows], [value(row) for row in rows]
        axes.plot(*times, marker="o", label=candidate, color=colors[candidate])
        if candidate != "attention" and kind != "slstm":
            bounds |= {r[axis]: value(r, "bound_seconds") for r in rows if "bound_seconds" in r}
    if bounds:
        axes.plot(*zip(*bounds.items(), strict=True), linestyle=":", label="bound", color="black")
    axes.set(xscale="log", yscale="log", xlabel=words, ylabel=unit)
    ticks = sorted({row[axis] for rows in candidates.values() for row in rows})
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks], fontsize=7)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 1.5)
    axes.set_title(f"{kind} {heads} heads, {TITLES[part]}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
