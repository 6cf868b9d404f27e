"""Records of a run as columns, reduced to the number of points that a chart can show."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from xlstm_jax.typing import Float, Int

Table = dict[str, np.ndarray]
"""Name -> one float64 per record, NaN where it is missing. "step" exists and is increasing."""

MAX_POINTS = 2000
"""Of a curve; more than a screen has columns of pixels."""

AXES = ("tokens_seen", "seconds")  # x axes besides the step


def number(value: Any) -> float:
    """A finite number as a float; NaN for everything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def make_table(records: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    """The named metrics of records that have any of them; names without a number are left out.

    Of several records of a step the last one counts: a run that rewinds writes steps again.
    """
    last = {r["step"]: r for r in records if not r.keys().isdisjoint(names)}
    ordered = [last[step] for step in sorted(last)]
    columns = {name: np.array([number(r.get(name)) for r in ordered]) for name in names}
    table = {"step": np.array([float(r["step"]) for r in ordered])}
    return table | {name: x for name, x in columns.items() if np.isfinite(x).any()}


def training_seconds(table: Table) -> Table:
    """The table with the time spent in train steps, summed from `step_time`, if it has that."""
    if "step_time" not in table:
        return table
    step, step_time = table["step"], table["step_time"]
    known = np.isfinite(step_time)
    # The first interval after a start has no time: its steps count as those of its neighbors.
    step_time = np.interp(step, step[known], step_time[known])
    return table | {"seconds": np.cumsum(step_time * np.diff(step, prepend=0.0))}


def with_axes(table: Table, train: Table) -> Table:
    """The table with the `AXES` that the training records have, interpolated at its steps."""
    axes = {}
    for name in AXES:
        if name in train:
            known = np.isfinite(train[name])
            step, value = train["step"][known], train[name][known]
            axes[name] = np.interp(table["step"], np.append(0.0, step), np.append(0.0, value))
    return table | axes


def thin(columns: Float[np.ndarray, "columns records"], limit: int) -> Int[np.ndarray, " selected"]:
    """Indices of at most `limit` records, among them the extremes of every column.

    The records are split into equal buckets. Each bucket keeps the records with the minimum and
    the maximum of each column, and the one with the most missing values, so that gaps stay visible.
    """
    num_columns, num_records = columns.shape
    if num_records <= limit:
        return np.arange(num_records)
    if limit == 1:
        return np.array([num_records - 1])
    missing = np.isnan(columns)
    columns = np.concatenate([columns, missing.sum(0, keepdims=True, dtype=float)])
    # The first and the last record are always selected.
    num_buckets = (limit - 2) // (2 * num_columns + 1)
    selected = [0, num_records - 1]
    low, high = np.nan_to_num(columns, nan=np.inf), np.nan_to_num(columns, nan=-np.inf)
    for bucket in np.array_split(np.arange(num_records), num_buckets) if num_buckets else ():
        selected += [*bucket[low[:-1, bucket].argmin(1)], *bucket[high[:, bucket].argmax(1)]]
    # Columns often share their extremes; evenly spaced records use the rest of the limit.
    even = np.linspace(0, num_records - 1, limit - len(set(selected)) + 2)  # with both ends
    return np.unique([*selected, *even.astype(int)])


def thin_table(table: Table, limit: int) -> Table:
    """The table with at most `limit` records; see `thin`."""
    names = [name for name in table if name not in ("step", *AXES)]
    if not names:
        return table
    index = thin(np.stack([table[name] for name in names]), limit)
    return {name: values[index] for name, values in table.items()}


def to_json(values: Float[np.ndarray, " records"]) -> list[float | None]:
    """Values of a chart: integers exactly, others to 5 digits, None where the value is missing."""

    def rounded(x: float) -> float | None:
        if not math.isfinite(x):
            return None
        # Larger integers are not exact in JavaScript either.
        return int(x) if x.is_integer() and abs(x) < 2**53 else float(f"{x:.5g}")

    return [rounded(x) for x in values.tolist()]
