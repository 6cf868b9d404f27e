"""Times of kernels as a table and as a picture."""

import importlib.metadata
import pathlib
import platform
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "triton")
TITLES = {"forward": "forward", "gradient": "forward + backward", "decode": "one step"}
UNITS = {"mlstm": ("ms", 1e3), "slstm": ("µs a step", 1e6), "decode": ("µs", 1e6)}
AXES = {
    "mlstm": ("T", "tokens in a row"),
    "slstm": ("K", "width of a head"),
    "decode": ("B", "batch"),
}
COLOURS = {
    "triton": "#c0392b",
    "chunkwise": "#2c6fbb",
    "recurrent": "#2c6fbb",
    "scan": "#2c6fbb",
    "attention": "#7f8c8d",
    "mlstm_kernels": "#e08e0b",
    "fla": "#2e8b57",
    "xlstm": "#e08e0b",
}


def versions() -> dict[str, str]:
    """Of Python and of what is installed of the packages that decide how fast a kernel is."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def section(row: Row) -> str:
    """A key of `UNITS`."""
    return "decode" if row["part"] == "decode" else row["op"]


def heads(row: Row) -> str:
    """The heads of one panel; an sLSTM's width is its axis."""
    return f"{row['H']}" if row["op"] == "slstm" else f"{row['H']} x ({row['K']}, {row['V']})"


def value(row: Row) -> float:
    """Time in the unit of the row's section: of a call, or of one step of an sLSTM."""
    steps = row["T"] if row["op"] == "slstm" else 1
    return row["median_seconds"] / steps * UNITS[section(row)][1]


def panels(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by section, heads and part, in their order."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((section(row), heads(row), row["part"]), []).append(row)
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
    for (kind, of, part), rows in panels(result["rows"]).items():
        axis = AXES[kind][0]
        columns = list(dict.fromkeys(row[axis] for row in rows))
        unit = UNITS[kind][0]
        lines.append(f"| {kind} {of}, {TITLES[part]}, {unit} | " + _joined(columns, f"{axis}={{}}"))
        lines.append("|---" * (1 + len(columns)) + "|")
        for candidate in dict.fromkeys(row["candidate"] for row in rows):
            of_it = {row[axis]: row for row in rows if row["candidate"] == candidate}
            if any("median_seconds" in row for row in of_it.values()):
                cells = [_cell(of_it.get(column, {})) for column in columns]
                lines.append(f"| {candidate} | " + _joined(cells))
        lines.append("")
    return "\n".join([*lines, *_missing(result["rows"])]) + "\n"


def _joined(cells: list[Any], form: str = "{}") -> str:
    return " | ".join(form.format(cell) for cell in cells) + " |"


def _cell(row: Row) -> str:
    if "median_seconds" not in row:
        return "-"
    extra = []
    if "share_of_bound" in row and section(row) != "slstm":
        extra.append(f"{row['share_of_bound']:.0%}")
    if "peak_bytes" in row:
        extra.append(_memory(row["peak_bytes"]))
    return f"{value(row):.3g}" + (f" ({', '.join(extra)})" if extra else "")


def _memory(size: int) -> str:
    return f"{size / 1e9:.2g} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"


def _missing(rows: list[Row]) -> list[str]:
    """Once per candidate and reason, how many cases it kept from running."""
    found: dict[str, int] = {}
    for row in rows:
        reason = row.get("skipped") or row.get("error")
        if reason:
            key = f"`{row['candidate']}`, {section(row)}: {reason}"
            found[key] = found.get(key, 0) + 1
    if not found:
        return []
    return [
        "Not run:",
        "",
        *(f"- {key} ({count} case{'s' * (count > 1)})" for key, count in found.items()),
    ]


def picture(result: dict[str, Any], path: pathlib.Path) -> None:
    """A panel per section, heads and part; both axes are logarithmic."""
    from matplotlib.figure import Figure

    drawn = {
        key: rows
        for key, rows in panels(result["rows"]).items()
        if any("median_seconds" in row for row in rows)
    }
    if not drawn:
        return
    lines = -(-len(drawn) // 2)
    figure = Figure(figsize=(10, 0.7 + 3.1 * lines), dpi=100, layout="constrained")
    figure.suptitle(caption(result), fontsize=8)
    for number, (key, rows) in enumerate(drawn.items()):
        _panel(figure.add_subplot(lines, 2, number + 1), key, rows)
    figure.savefig(path)


def _panel(axes: Any, key: tuple[str, str, str], rows: list[Row]) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    kind, of, part = key
    axis, words = AXES[kind]
    for candidate in dict.fromkeys(row["candidate"] for row in rows):
        of_it = [row for row in rows if row["candidate"] == candidate and "median_seconds" in row]
        _line(axes, of_it, axis, value, marker="o", label=candidate, color=COLOURS[candidate])
    bounded = [row for row in rows if "bound_seconds" in row and row["candidate"] != "attention"]
    bounded = list({row[axis]: row for row in bounded}.values())
    if kind != "slstm":
        bound = lambda row: row["bound_seconds"] * UNITS[kind][1]  # noqa: E731
        _line(axes, bounded, axis, bound, linestyle=":", label="bound", color="black")
    axes.set(xscale="log", yscale="log", xlabel=words, ylabel=UNITS[kind][0])
    ticks = sorted({row[axis] for row in rows})
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks], fontsize=7)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 1.5)
    axes.set_title(f"{kind} {of} heads, {TITLES[part]}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _line(axes: Any, rows: list[Row], axis: str, height: Callable[[Row], float], **style) -> None:
    if rows:
        axes.plot([row[axis] for row in rows], [height(row) for row in rows], **style)
