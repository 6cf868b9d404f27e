"""Plot of the training and validation loss of a run."""

import math
from pathlib import Path
from typing import Any

import numpy as np


def loss_curve(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plots the records of metrics.jsonl to a PNG.

    In bits per byte if the validation loss is, at the bytes per token of the validation text.
    """
    # Imported here because it takes half a second, needed at the end of a run only.
    from matplotlib.figure import Figure

    points, valid = _series(records, "valid_bits_per_byte")
    _, nats = _series(records, "valid_loss")
    is_text = len(points) > 0 and len(nats) > 0
    points, valid = (points, valid) if is_text else _series(records, "valid_loss")
    scale = valid[-1] / nats[-1] if is_text else 1.0
    steps, losses = _series(records, "loss")
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses * scale, color="#9ecae1", linewidth=0.8)
    axes.plot(steps, _smooth(losses) * scale, color="#08519c", linewidth=1.8, label="training")
    if len(points):
        axes.plot(points, valid, "o", color="#d94801", markersize=5, label="validation", zorder=3)
        axes.annotate(
            f"{valid[-1]:.3f}",
            (points[-1], valid[-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color="#d94801",
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    shown = np.concatenate([_smooth(losses) * scale, valid])
    if len(shown):
        # The first losses are far above the rest and would flatten the curve.
        low, high = shown.min(), np.quantile(shown, 0.98)
        margin = 0.08 * (high - low) + 1e-3
        axes.set_ylim(max(0.0, low - margin), high + 2 * margin)
        axes.legend(frameon=False)
    axes.set_title(title, loc="left", parse_math=False)  # a "$" in a name is not a formula
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte" if is_text else "nats per token")
    figure.savefig(path)


def _series(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r["step"], r[name]) for r in records if _is_finite(r.get(name))]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centered moving average over a twentieth of the run, narrower near the ends."""
    reach = len(values) // 40  # to either side
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    # Symmetric at the ends too, so that the curve is not shifted.
    radius = np.minimum(reach, np.minimum(index, index[::-1]))
    return (sums[index + radius + 1] - sums[index - radius]) / (2 * radius + 1)
