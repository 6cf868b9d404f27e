"""Kernel times as a Markdown table and as a plot."""

import collections
import pathlib
from typing import Any

from experiments.benchmarks import measure

Record = dict[str, Any]

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "triton")
TITLES = {"forward": "forward", "gradient": "forward + backward", "decode": "one step"}
# Section -> unit, units per second, field of the sizes, and label of the size axis.
SECTIONS = {
    "mlstm": ("ms", 1e3, "T", "sequence length"),
    "slstm": ("µs per step", 1e6, "K", "head dimension"),
    "decode": ("µs", 1e6, "B", "batch size"),
}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the speed of a kernel."""
    return measure.versions(PACKAGES)


def section(record: Record) -> str:
    """The section of a record, a key of `SECTIONS`."""
    return "decode" if record["part"] == "decode" else record["op"]


def value(record: Record, seconds: str = "median_seconds") -> float:
    """The time of a call, or of one step of an sLSTM, in the unit of the record's section."""
    steps = record["T"] if record["op"] == "slstm" else 1
    return record[seconds] / steps * SECTIONS[section(record)][1]


def panels(records: list[Record]) -> dict[tuple[str, str, str], dict[str, list[Record]]]:
    """Records by (section, heads, part), and within these by candidate; order is preserved."""
    grouped: dict[tuple[str, str, str], dict[str, list[Record]]] = {}
    for record in records:
        dims = "" if record["op"] == "slstm" else f" x ({record['K']}, {record['V']})"
        panel = grouped.setdefault((section(record), f"{record['H']}{dims}", record["part"]), {})
        panel.setdefault(record["candidate"], []).append(record)
    return grouped


def caption(result: dict[str, Any]) -> str:
    """Device, versions, dtypes and date of a result."""
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    driver = result["driver"].get("driver_version")
    device = result["device"] + (f", driver {driver}" if driver else "")
    dtypes = ", ".join(dict.fromkeys(record["dtype"] for record in result["records"]))
    return f"{device}; {packages}; {dtypes}; {result['date'][:10]}"


def table(result: dict[str, Any]) -> str:
    """Markdown: one table per panel, candidates by sizes; then the reasons of missing times."""
    records: list[Record] = result["records"]
    lines = [f"{caption(result)}. Medians; share of the bound; peak memory.", ""]
    for (kind, heads, part), candidates in panels(records).items():
        unit, _, axis, _ = SECTIONS[kind]
        sizes = dict.fromkeys(record[axis] for group in candidates.values() for record in group)
        header = [f"{kind} {heads}, {TITLES[part]}, {unit}", *(f"{axis}={n}" for n in sizes)]
        body = []
        for candidate, group in candidates.items():
            cells = {record[axis]: _cell(record) for record in group}
            if any(cells.values()):
                body.append([candidate, *(cells.get(size) or "-" for size in sizes)])
        lines += [measure.table(header, body), ""]
    reasons = collections.Counter(
        f"`{record['candidate']}`, {section(record)}: {record.get('skipped') or record['error']}"
        for record in records
        if "skipped" in record or "error" in record
    )
    missing = [f"- {reason} ({n} case{'s' * (n > 1)})" for reason, n in reasons.items()]
    return "\n".join([*lines, *(["Not run:", "", *missing] if missing else [])]) + "\n"


def _cell(record: Record) -> str:
    """Time, share of the bound and memory; empty without a time."""
    if "median_seconds" not in record:
        return ""
    extra = []
    if "share_of_bound" in record and section(record) != "slstm":
        extra.append(f"{record['share_of_bound']:.0%}")
    if size := record.get("peak_bytes"):
        extra.append(f"{size / 1e9:.2g} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB")
    return f"{value(record):.3g}" + (f" ({', '.join(extra)})" if extra else "")


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Saves a figure with one panel per section, heads and part; both axes are logarithmic."""
    from matplotlib.figure import Figure

    timed = [record for record in result["records"] if "median_seconds" in record]
    grouped = panels(timed)
    if not grouped:
        return
    height = -(-len(grouped) // 2)  # in panels, two side by side
    figure = Figure(figsize=(10, 0.7 + 3.1 * height), dpi=100, layout="constrained")
    figure.suptitle(caption(result), fontsize=8)
    colors = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(r["candidate"] for r in timed))}
    for number, (key, candidates) in enumerate(grouped.items()):
        _panel(figure.add_subplot(height, 2, number + 1), key, candidates, colors)
    figure.savefig(path)


def _panel(
    axes: Any,
    key: tuple[str, str, str],
    candidates: dict[str, list[Record]],
    colors: dict[str, str],
) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    kind, heads, part = key
    unit, _, axis, label = SECTIONS[kind]
    bounds: dict[int, float] = {}
    for candidate, records in candidates.items():
        points = [record[axis] for record in records], [value(record) for record in records]
        axes.plot(*points, marker="o", label=candidate, color=colors[candidate])
        # The bound of attention differs from that of the mLSTM, which the others share.
        if candidate != "attention" and kind != "slstm":
            bounds |= {r[axis]: value(r, "bound_seconds") for r in records if "bound_seconds" in r}
    if bounds:
        axes.plot(*zip(*bounds.items(), strict=True), linestyle=":", label="bound", color="black")
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
    ticks = sorted({record[axis] for records in candidates.values() for record in records})
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks], fontsize=7)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 1.5)
    axes.set_title(f"{kind} {heads} heads, {TITLES[part]}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
