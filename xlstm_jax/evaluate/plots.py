"""One picture that compares models."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xlstm_jax.errors import ConfigError, quote_path, shorten
from xlstm_jax.evaluate.results import Evaluation, label_of, short_names

# Distinguishable with any color vision: Okabe and Ito 2008, without black and yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"

MAX_LABELED = 30
"""Domains and metrics that have a line of their own; with more, domains have ranks."""

FORMATS = (".png", ".pdf", ".svg")


def check_format(path: Path) -> None:
    """Raises ConfigError unless a picture can have the name of this file."""
    if path.suffix not in FORMATS:
        raise ConfigError(
            f"--plot must be a file that ends in {', '.join(FORMATS)}, got {quote_path(path)}; "
            "rename it."
        )


def plot(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Plots what was measured of all models, one panel per kind of result."""
    # Imported here because it takes half a second, needed for --plot only.
    from matplotlib.figure import Figure

    panels: list[Callable[[Any, Sequence[Evaluation], list[str]], None]] = []
    if any(e.perplexity for e in evaluations):
        panels.append(_perplexity)
    if any(e.by_position for e in evaluations):
        panels.append(_positions)
    if any(e.by_frequency for e in evaluations):
        panels.append(_frequencies)
    if any(e.domains for e in evaluations):
        panels.append(_domains)
    if any(_rates(e) for e in evaluations):
        panels.append(_tasks)
    columns = min(len(panels), 2) or 1
    grid = max(math.ceil(len(panels) / columns), 1), columns
    figure = Figure(figsize=(6.6 * grid[1], 4.2 * grid[0]), dpi=110, layout="constrained")
    all_axes = figure.subplots(*grid, squeeze=False).ravel()
    names = [shorten(name, 40) for name in short_names([e.model for e in evaluations])]
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes, panel in zip(all_axes, panels, strict=False):
        panel(axes, evaluations, names)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": ("-", "--", ":")[number // len(COLORS) % 3],
        "markersize": 5,
    }


def _title(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", parse_math=False)  # a "$" in a name is not a formula


def _legend(axes: Any, names: Sequence[str]) -> None:
    if len(names) > 1:
        legend = axes.legend(frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _perplexity(axes: Any, evaluations: Sequence[Evaluation], names: list[str]) -> None:
    """Bars: bits per byte where the data are text, else perplexities."""
    is_text = all(e.perplexity and e.perplexity.bits_per_byte for e in evaluations)
    values = [
        math.nan if e.perplexity is None
        else e.perplexity.bits_per_byte if is_text
        else e.perplexity.perplexity
        for e in evaluations
    ]  # fmt: skip
    colors = [_style(n)["color"] for n in range(len(names))]
    ticks = range(len(names))
    bars = axes.barh(ticks, values, color=colors, height=min(0.6, 0.2 * len(names)))
    axes.bar_label(bars, fmt="%.4f", padding=4)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.15)
    _title(axes, "bits per byte" if is_text else "perplexity")


def _positions(axes: Any, evaluations: Sequence[Evaluation], names: list[str]) -> None:
    for number, (evaluation, name) in enumerate(zip(evaluations, names, strict=True)):
        buckets = [b for b in evaluation.by_position if b.num_tokens]
        # The middle of a bucket, counted from 1: a logarithmic axis has no 0.
        x = [(b.start + (b.stop or 0) + 1) / 2 for b in buckets]
        axes.plot(x, [b.nats_per_token for b in buckets], label=name, **_style(number))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("position in the window, counted from 1")
    axes.set_ylabel("nats per token")
    _title(axes, "loss by position")
    _legend(axes, names)


def _frequencies(axes: Any, evaluations: Sequence[Evaluation], names: list[str]) -> None:
    buckets = evaluations[0].by_frequency
    for number, (evaluation, name) in enumerate(zip(evaluations, names, strict=True)):
        losses = [bucket.nats_per_token for bucket in evaluation.by_frequency]
        axes.plot(range(len(losses)), losses, label=name, **_style(number))
    labels = [label_of(bucket) for bucket in buckets]
    axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize=9)
    axes.set_xlabel("count of the token in the training data")
    axes.set_ylabel("nats per token")
    _title(axes, "loss by token frequency")
    _legend(axes, names)


def _domains(axes: Any, evaluations: Sequence[Evaluation], names: list[str]) -> None:
    """Bits per byte of each domain, in the order of the first model."""
    first = evaluations[0].domains
    order = sorted(first, key=lambda domain: first[domain].bits_per_byte)
    for number, (evaluation, name) in enumerate(zip(evaluations, names, strict=True)):
        values = [evaluation.domains[domain].bits_per_byte for domain in order]
        style = _style(number) | {"label": name}
        if len(order) > MAX_LABELED:
            axes.plot(range(len(order)), values, **style | {"marker": "", "linewidth": 1})
        else:
            axes.plot(values, range(len(order)), **style | {"linestyle": ""})
    if len(order) > MAX_LABELED:
        axes.set_xlabel(f"rank of the domain for {names[0]}", parse_math=False)
        axes.set_ylabel("bits per byte")
    else:
        axes.set_yticks(range(len(order)), [shorten(d, 40) for d in order], parse_math=False)
        axes.set_ylim(-0.5, len(order) - 0.5)
        axes.set_xlabel("bits per byte")
    _title(axes, f"{len(order)} domains")
    _legend(axes, names)


def _rates(evaluation: Evaluation) -> dict[str, tuple[float, float]]:
    """Label -> value and standard error of every metric of tasks from 0 to 1."""
    return {
        f"{task}, {name}": (value, metrics.get(_stderr(name)) or 0.0)
        for task, metrics in evaluation.tasks.items()
        for name, value in metrics.items()
        if _stderr(name) in metrics and 0 <= value <= 1
    }


def _stderr(metric: str) -> str:
    """The name of the standard error of a metric, before that of its filter."""
    name, comma, kind = metric.partition(",")
    return f"{name}_stderr{comma}{kind}"


def _tasks(axes: Any, evaluations: Sequence[Evaluation], names: list[str]) -> None:
    labels = list(dict.fromkeys(label for e in evaluations for label in _rates(e)))[:MAX_LABELED]
    for number, (evaluation, name) in enumerate(zip(evaluations, names, strict=True)):
        rates, style = _rates(evaluation), _style(number) | {"linestyle": ""}
        # Side by side, so that error bars do not hide each other.
        shift = 0.15 * (number - (len(names) - 1) / 2)
        points = [(n + shift, *rates[label]) for n, label in enumerate(labels) if label in rates]
        if points:
            y, values, errors = zip(*points, strict=True)
            axes.errorbar(values, y, xerr=errors, label=name, capsize=2, **style)
    axes.set_yticks(range(len(labels)), [shorten(x, 48) for x in labels], parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("value, and its standard error")
    _title(axes, "tasks")
    _legend(axes, names)
