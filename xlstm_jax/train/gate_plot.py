"""Picture of the gate statistics of a run: heads by blocks, one panel per statistic."""

from pathlib import Path
from typing import Any

import numpy as np

# Statistic -> title with unit, color map, logarithmic color scale. The maps are perceptually
# uniform and safe for color blindness; the diverging one is for values of either sign.
PANELS = {
    "effective_length": ("effective length (tokens)", "viridis", True),
    "forget_mean": ("mean forget gate", "viridis", False),
    "C_norm": ("norm of the stored memory", "viridis", True),
    "input_mean": ("mean input gate (pre-activation)", "PuOr", False),
    "input_range": ("range of the input gate (pre-activation)", "cividis", False),
    "floor_share": ("positions at the normalizer floor (share)", "cividis", False),
}


def draw(gates: dict[str, Any], path: Path, title: str) -> None:
    """Draws the statistics of one record, `gates` of metrics.jsonl, to a PNG of bounded size."""
    # Imported here because it takes half a second, needed for pictures only.
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.6), dpi=110, layout="constrained")
    for axes, (name, (label, cmap, is_log)) in zip(
        figure.subplots(2, 3).flat, PANELS.items(), strict=True
    ):
        values = _heads_by_blocks(gates, name)
        values = np.where(values > 0, values, np.nan) if is_log else values
        axes.set_title(label, fontsize=12)
        axes.set_facecolor("0.88")  # no value: another number of heads, or no such statistic
        low, high = _limits(values, symmetric=cmap == "PuOr", unit=name == "floor_share")
        norm = LogNorm(low, high) if is_log else Normalize(low, high)
        image = axes.imshow(values, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes).ax.tick_params(labelsize=10)
        blocks, heads = list(gates), len(values)
        every = -(-len(blocks) // 8)  # labels that fit beside each other
        axes.set_xticks(range(0, len(blocks), every), blocks[::every], fontsize=10)
        axes.set_yticks(range(0, heads, max(1, heads // 8)))
        axes.tick_params(axis="y", labelsize=10)
        axes.set_xlabel("block", fontsize=11)
        axes.set_ylabel("head", fontsize=11)
    figure.suptitle(title, fontsize=13, x=0.01, ha="left", parse_math=False)
    figure.savefig(path)


def _heads_by_blocks(gates: dict[str, Any], name: str) -> np.ndarray:
    """The values of a statistic, heads x blocks; NaN where it is missing."""
    columns = []
    for block in gates.values():
        if name == "input_range":
            ends = (np.array(block.get(f"input_{end}", []), float) for end in ("max", "min"))
            columns.append(np.subtract(*ends))
        else:
            columns.append(np.array(block.get(name, []), float))
    num_heads = max(len(head) for block in gates.values() for head in block.values())
    values = np.full((num_heads, len(columns)), np.nan)
    for n, column in enumerate(columns):
        values[: len(column), n] = column
    return np.where(np.isfinite(values), values, np.nan)


def _limits(values: np.ndarray, *, symmetric: bool, unit: bool) -> tuple[float, float]:
    """Ends of the color scale; different ones, also where all values are equal or missing."""
    finite = values[np.isfinite(values)]
    if unit or not len(finite):
        return (0.0, 1.0) if unit else (1.0, 2.0)
    low, high = float(finite.min()), float(finite.max())
    if symmetric:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    if high == low:
        margin = 0.05 * abs(low) or 0.05  # keeps a positive value positive, for a logarithm
        low, high = low - margin, high + margin
    return low, high
