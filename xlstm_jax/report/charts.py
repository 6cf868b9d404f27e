"""The charts of a report: which ones are shown, their values as JSON, and their HTML frames."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from xlstm_jax.report.runs import Run
from xlstm_jax.report.series import AXES, to_json
from xlstm_jax.report.tables import escape, metric_title


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A line chart of one of `metrics`, which the reader selects; page.js draws it."""

    id: str
    title: str
    unit: str  # of the y axis; empty: the metric says it
    metrics: tuple[str, ...]
    table: Literal["train", "validation"] = "train"
    log: bool = False  # the switch to a logarithmic y axis applies
    format: str = ",.4~r"  # of values on hover, in the notation of d3


LOSSES = (
    Chart(id="loss", title="Training loss", unit="nats per token", metrics=("loss",), log=True),
)
THROUGHPUT = (
    Chart(id="tokens", title="Tokens per second", unit="", metrics=("tokens_per_second",)),
    Chart(id="mfu", title="Model FLOPs utilization", unit="", metrics=("mfu",), format=".4~p"),
    Chart(
        id="wait",
        title="Waiting for data",
        unit="share of the step time",
        metrics=("data_wait",),
        format=".4~p",
    ),
    Chart(
        id="goodput", title="Goodput", unit="share of the time", metrics=("goodput",), format=".4~p"
    ),
)
OPTIMIZATION = (
    Chart(
        id="grad", title="Gradient norm before clipping", unit="", metrics=("grad_norm",), log=True
    ),
    Chart(id="lr", title="Learning rate", unit="", metrics=("lr",), log=True),
    Chart(id="skipped", title="Skipped steps", unit="steps so far", metrics=("skipped",)),
)


def validation_charts(runs: Sequence[Run]) -> tuple[Chart, ...]:
    """The chart of the validation metrics of any run; the losses come first."""
    names = dict.fromkeys(x for run in runs for x in run.validation if x not in ("step", *AXES))
    ordered = sorted(names, key=lambda x: (not x.endswith("_loss"), x != "valid_loss"))
    chart = Chart(
        id="validation",
        title="Validation data",
        unit="",
        metrics=tuple(ordered),
        table="validation",
        log=True,
    )
    return (chart,) if names else ()


def present(charts: Sequence[Chart], runs: Sequence[Run]) -> list[Chart]:
    """The charts with a metric of some run; that of skipped steps only if a step was skipped."""
    return [
        chart
        for chart in charts
        if any(
            name in getattr(run, chart.table) and (name != "skipped" or run.summary.skipped)
            for run in runs
            for name in chart.metrics
        )
    ]


def to_html(charts: Sequence[Chart], num_runs: int) -> str:
    """The frames that page.js fills."""
    runs = "one run" if num_runs == 1 else f"{num_runs} runs"
    frames = []
    for chart in charts:
        options = {x: metric_title(x) for x in chart.metrics if len(chart.metrics) > 1}
        text = f"Line chart: {chart.title.lower()} of {runs} during training"
        frames.append(_frame(chart.id, chart.title, text, _select("metric", options)))
    return "".join(frames) or '<p class="note">No run has such records.</p>'


def gates_to_html(runs: Sequence[Run]) -> str:
    """The frames of the gate statistics of one run, which the reader selects."""
    with_gates = {str(n): run.summary.name for n, run in enumerate(runs) if run.gates}
    if not with_gates:
        return (
            '<p class="note">No run has gate statistics, which <code>train.watch</code> adds, or '
            "they are too large for a page of so many runs.</p>"
        )
    names = dict.fromkeys(name for run in runs for name in run.gates.get("curves", ()))
    ordered = sorted(names, key=lambda name: name != "effective_length")
    selects = _select("run", with_gates) + _select(
        "statistic", {name: name.replace("_", " ") for name in ordered}
    )
    return (
        f'<div class="controls" id="gate-controls">{selects}</div>'
        + _frame("gates", "By step", "Line chart: the statistic of each head during training")
        + _frame("gates-last", "Last record", "Heatmap: the last statistic of each block and head")
    )


def _frame(chart_id: str, title: str, text: str, select: str = "") -> str:
    return (
        f'<figure id="chart-{chart_id}"><figcaption><h3>{title}</h3>{select}</figcaption>'
        f'<div class="plot" role="img" aria-label="{text}."></div>'
        '<div class="key" aria-hidden="true"></div></figure>'
    )


def _select(name: str, options: dict[str, str]) -> str:
    """A labeled choice; empty without options."""
    items = "".join(f'<option value="{escape(x)}">{escape(options[x])}</option>' for x in options)
    return f'<label>{name} <select data-choice="{name}">{items}</select></label>' if items else ""


def to_data(charts: Sequence[Chart], runs: Sequence[Run]) -> dict[str, Any]:
    """What page.js draws, as JSON values."""
    return {
        "charts": [dataclasses.asdict(chart) for chart in charts],
        "runs": [
            {
                "name": run.summary.name,
                "train": {name: to_json(x) for name, x in run.train.items()},
                "validation": {name: to_json(x) for name, x in run.validation.items()},
                "gates": run.gates,
            }
            for run in runs
        ],
    }
