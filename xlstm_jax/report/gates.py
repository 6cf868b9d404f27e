"""Gate statistics of a run: a curve for each head of each block."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from xlstm_jax.errors import printable, shorten
from xlstm_jax.report.series import AXES, MAX_POINTS, Table, number, thin, to_json, with_axes

BYTES_PER_VALUE, BYTES_PER_CURVE = 8, 40  # of the page; about

Curves = dict[tuple[str, int], np.ndarray]
"""Block, such as "0:m", and head -> a value per record."""


def collect(records: Sequence[dict[str, Any]], train: Table, max_bytes: float) -> dict[str, Any]:
    """The gate statistics of a run as JSON values of about `max_bytes`.

    Empty if the run has none, or if those of one record are larger.

    Returns:
        `curves` maps a statistic to its curves, each with `block`, `head` and `values`, one per
        record; `step` and the other x axes have one value per record, too.
    """
    gates = {r["step"]: r["gates"] for r in records if isinstance(r.get("gates"), dict)}
    statistics = _curves([gates[step] for step in sorted(gates)])
    num_curves = sum(map(len, statistics.values()))
    if num_curves * (BYTES_PER_CURVE + BYTES_PER_VALUE) > max_bytes or num_curves == 0:
        return {}
    max_records = int((max_bytes / num_curves - BYTES_PER_CURVE) / BYTES_PER_VALUE)
    # Extremes over all heads: the limit leaves too few points for those of each head.
    stacks = [np.stack([*curves.values()]) for curves in statistics.values()]
    extremes = [fn.reduce(stack) for stack in stacks for fn in (np.fmin, np.fmax)]
    index = thin(np.stack(extremes), min(max_records, MAX_POINTS))
    table = with_axes({"step": np.array(sorted(gates), float)[index]}, train)
    shown = {
        label(name): [
            {"block": label(block), "head": head, "values": to_json(values[index])}
            for (block, head), values in curves.items()
        ]
        for name, curves in statistics.items()
    }
    axes = {axis: to_json(table[axis]) for axis in ("step", *AXES) if axis in table}
    return axes | {"curves": shown}


def _curves(gates: Sequence[dict[str, Any]]) -> dict[str, Curves]:
    """Statistic -> its curves; whatever is not a number or a list of numbers is left out."""
    statistics: dict[str, Curves] = {}
    for n, blocks in enumerate(gates):
        for block, values_by_name in blocks.items():
            for name, values in values_by_name.items() if isinstance(values_by_name, dict) else ():
                curves = statistics.setdefault(name, {})
                for head, value in enumerate(values if isinstance(values, list) else [values]):
                    if (block, head) not in curves:
                        curves[block, head] = np.full(len(gates), np.nan)
                    curves[block, head][n] = number(value)
    return {name: curves for name, curves in statistics.items() if curves}


def label(text: str) -> str:
    """A name from a file for the page: printable, of bounded length."""
    return shorten(printable(text))
