"""HTML tables of a report. All text is escaped here."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xlstm_jax.errors import printable, shorten
from xlstm_jax.report.gates import label
from xlstm_jax.report.runs import Summary

MAX_VALUE = 200  # characters of a field that are shown
NUM_COLORS = 6  # --run-0 ... of page.css
DASHES = ("none", "6 3", "1.5 2.5", "7 2.5 1.5 2.5", "11 4")
"""Dashes of lines in SVG: runs of one color differ in them. page.js has the same for plotly."""


def escape(text: object) -> str:
    """Text as HTML, also within attributes."""
    return html.escape(printable(str(text)))


def swatch(index: int) -> str:
    """The line of the run with this index, as in the charts."""
    color, dash = index % NUM_COLORS, DASHES[index // NUM_COLORS % len(DASHES)]
    return (
        '<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><path d="M0 4h28" '
        f'style="stroke:var(--run-{color})" stroke-dasharray="{dash}"/></svg>'
    )


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in a box that scrolls on narrow screens; the first cell of a row is its header.

    Cells are HTML. A row whose header begins with `DIFFERS` is highlighted.
    """
    body = []
    for first, *cells in rows:
        kind = ' class="differs"' if first.startswith(DIFFERS) else ""
        data = "".join(f"<td>{cell}</td>" for cell in cells)
        body.append(f'<tr{kind}><th scope="row">{first}</th>{data}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in header)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table><caption>'
        f"{caption}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        "</div>"
    )


DIFFERS = '<span class="mark" title="differs">≠</span> '


def summary(summaries: Sequence[Summary]) -> str:
    """One row per run with its final values; the lowest validation values are marked."""
    metrics = dict.fromkeys(
        name for s in summaries for name in s.evaluation if not name.endswith("_accuracy")
    )
    values = {name: [s.evaluation.get(name) for s in summaries] for name in metrics}
    columns: dict[str, list[str]] = {
        "run": [f"{swatch(n)} {escape(s.name)}" for n, s in enumerate(summaries)],
        "status": [f'<span class="{s.status.split()[0]}">{s.status}</span>' for s in summaries],
    }
    columns |= {escape(metric_title(name)): _lowest(values[name]) for name in metrics}
    columns |= {
        "training loss": [_number(s.loss) for s in summaries],
        "step": [_steps(s) for s in summaries],
        "tokens": [_count(s.tokens_seen) for s in summaries],
        "time in steps": [_time(s.seconds) for s in summaries],
        "parameters": [_count(s.num_params) for s in summaries],
        "tokens/s": [_count(s.tokens_per_second) for s in summaries],
        "MFU": [_percent(s.mfu) for s in summaries],
        "goodput": [_percent(s.goodput) for s in summaries],
        "skipped steps": [_count(s.skipped) for s in summaries],
    }
    always = ("run", "status", "step")
    shown = {k: cells for k, cells in columns.items() if k in always or {*cells} != {"-"}}
    return table("Final values", list(shown), zip(*shown.values(), strict=True))


def metric_title(name: str) -> str:
    """A validation metric in words: "valid_bits_per_byte" is "valid bits per byte"."""
    return label(name.replace("_", " "))


def _lowest(values: Sequence[float | None]) -> list[str]:
    known = [value for value in values if value is not None]
    cells = []
    for value in values:
        is_lowest = len(values) > 1 and value is not None and value == min(known)
        cells.append(f"<strong>{_number(value)}</strong>" if is_lowest else _number(value))
    return cells


def _steps(s: Summary) -> str:
    return f"{s.step:,}" if s.steps in (None, s.step) else f"{s.step:,} of {s.steps:,}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def comparison(
    caption: str, runs: Mapping[str, Mapping[str, Any]], *, only_differing: bool = False
) -> str:
    """The fields of runs, with a column for each group of runs that agree in all of them.

    Fields that differ are highlighted. If there are more groups than fields, each row is a run.
    """
    names = list(dict.fromkeys(name for fields in runs.values() for name in fields))
    texts = {
        run: [_text(fields.get(name, ABSENT)) for name in names] for run, fields in runs.items()
    }
    differs = [len({*values}) > 1 for values in zip(*texts.values(), strict=True)]
    shown = [n for n in range(len(names)) if differs[n] or not only_differing]
    if not shown:
        return f'<p class="note">{"No fields differ." if only_differing else "Not recorded."}</p>'
    groups: dict[tuple[str, ...], list[str]] = {}
    for index, (run, values) in enumerate(texts.items()):
        name = f'<span class="run">{swatch(index)} {escape(run)}</span>'
        groups.setdefault(tuple(values[n] for n in shown), []).append(name)
    marks = [DIFFERS if differs[n] and not only_differing else "" for n in shown]
    fields = [mark + escape(label(names[n])) for mark, n in zip(marks, shown, strict=True)]
    members = [", ".join(group) for group in groups.values()]
    if len(groups) == 1 < len(runs):
        members = [f"all {len(runs)} runs"]
    cells = [[escape(shorten(value, MAX_VALUE)) for value in group] for group in groups]
    if len(groups) > len(shown):
        return table(caption, ["run", *fields], map(_row, members, cells))
    return table(caption, ["field", *members], map(_row, fields, zip(*cells, strict=True)))


ABSENT = "-"


def _row(first: str, cells: Iterable[str]) -> list[str]:
    return [first, *cells]


def _text(value: Any) -> str:
    """A field as text; 1.0 like 1, which a float field may hold as well."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
