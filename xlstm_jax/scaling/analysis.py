"""Analysis files: which runs of a table are fitted, and how. The code has no rules of a study."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlstm_jax.config import check_fields
from xlstm_jax.errors import ConfigError
from xlstm_jax.scaling import table
from xlstm_jax.scaling.table import Runs
from xlstm_jax.typing import Bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """A range or a set of values of a column."""

    column: str
    low: float | None = None  # exclusive; None: no limit
    high: float | None = None  # exclusive
    values: tuple[str | float, ...] = ()  # (): any

    def __post_init__(self):
        check_fields(self, f"condition on {self.column!r}: ", {})

    def holds(self, runs: Runs) -> Bool[np.ndarray, "n"]:
        """Whether each run satisfies the condition; a missing number does not."""
        column = runs[self.column]
        result = np.ones(len(runs), bool)
        if self.low is not None or self.high is not None:
            if column.dtype != np.float64:
                raise ConfigError(
                    f"a range of column {self.column} needs numbers, and it holds text; use values."
                )
            low, high = self.low, self.high
            result &= column > (-np.inf if low is None else low)
            result &= column < (np.inf if high is None else high)
        if self.values:
            wanted: list[Any] = [str(x) for x in self.values]
            if column.dtype == np.float64:
                wanted = [_number_or_nan(x) for x in self.values]
            result &= np.isin(column, wanted)
        return result


def all_hold(conditions: Sequence[Condition], runs: Runs) -> Bool[np.ndarray, "n"]:
    """Whether each run satisfies all conditions; every run does if there are none."""
    result = np.ones(len(runs), bool)
    for condition in conditions:
        result &= condition.holds(runs)
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Runs for which all conditions hold."""

    reason: str  # shown with the number of runs
    conditions: tuple[Condition, ...]

    def __post_init__(self):
        check_fields(self, "rule: ", {})
        if not self.conditions:
            raise ConfigError(f"rule {self.reason!r} must have at least one condition; add one.")

    def holds(self, runs: Runs) -> Bool[np.ndarray, "n"]:
        """Whether each run satisfies all conditions."""
        return all_hold(self.conditions, runs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """Filters, labels and ranges of the fits of one table.

    An analysis file is a Python file whose `config()` returns an `Analysis`, or its fields as JSON.
    """

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # ours -> the table's
    groups: tuple[str, ...] = ("model", "context_length")  # a fit for each combination of values
    keep: tuple[Condition, ...] = ()  # runs for which all hold
    drop: tuple[Rule, ...] = ()  # then without those for which one holds
    drop_duplicates: bool = False  # copies are an error otherwise
    # FLOPs of the parabolas; (): of the column `budget_column` if the table has it, else the
    # clusters of the FLOPs of runs.
    budgets: tuple[float, ...] = ()
    budget_column: str = "isoflop"
    budget_tolerance: float = 0.1  # largest relative distance of a run from its budget
    isoflop: tuple[Condition, ...] = ()  # runs of the parabolas
    flops_range: tuple[float, float] | None = None  # budgets of the power laws
    surface: tuple[Condition, ...] = ()  # runs of the loss surface
    ratio_column: str = "preset_tokens_per_param"  # label of runs with fixed tokens per parameter
    free_gamma: bool = True  # of the loss surface, as the fields below
    delta: float = 1e-3
    starts: int | None = None  # None: all
    bootstraps: int = 0
    seed: int = 0

    def __post_init__(self):
        check_fields(
            self,
            "",
            {
                "above 0": "delta budget_tolerance",
                "at least 1": "starts",
                "at least 0": "bootstraps",
            },
        )

    def select(self, runs: Runs) -> Runs:
        """The runs that are fitted; what was dropped is in their notes.

        Raises:
            ConfigError: ids are not unique, a run has a copy, or no run is left.
        """
        count = len(runs)
        runs = runs.select(all_hold(self.keep, runs))
        for rule in self.drop:
            dropped = rule.holds(runs)
            runs = runs.select(~dropped, f"dropped {dropped.sum()} runs: {rule.reason}")
        num_left = len(runs)
        runs = table.without_missing(runs)
        table.check_ids(runs)
        if not len(runs):
            raise ConfigError(
                f"no run is left to fit: keep and drop leave {num_left} of {count}, none of which "
                "has sizes and a loss; loosen the filters or complete the table."
            )
        return table.without_duplicates(runs, drop=self.drop_duplicates)

    def split(self, runs: Runs) -> dict[tuple[str, ...], Runs]:
        """The runs of each group, by the values of those of `groups` that the table has."""
        names = [name for name in self.groups if name in runs.columns]
        keys = list(zip(*([_text(x) for x in runs[name]] for name in names), strict=True))
        keys = keys or [()] * len(runs)
        return {
            key: runs.select(np.array([other == key for other in keys]))
            for key in sorted(set(keys), key=_in_order)
        }

    def budget_of(self, runs: Runs) -> np.ndarray:
        """The label of each run's budget in FLOPs; NaN where it has none."""
        flops = runs["train_flops"]
        labels = np.array(self.budgets)
        if not len(labels) and self.budget_column in runs.columns:
            numbers = [_number_or_nan(x) for x in runs[self.budget_column]]
            return np.array(numbers, np.float64)
        if not len(labels):
            labels = _clusters(flops, self.budget_tolerance)
        if not len(labels):
            return np.full(len(runs), np.nan)
        distance = np.abs(flops[:, None] / labels - 1)
        nearest = distance.argmin(axis=1)
        is_near = distance.min(axis=1) < self.budget_tolerance
        return np.where(is_near, labels[nearest], np.nan)

    def ratio_of(self, runs: Runs) -> np.ndarray:
        """The label of each run's tokens per parameter; NaN where it has none."""
        return np.array([_number_or_nan(x) for x in runs[self.ratio_column]], np.float64)


def _in_order(key: tuple[str, ...]) -> list[tuple[bool, float, str]]:
    """Numbers by size, before text."""
    numbers = [_number_or_nan(text) for text in key]
    return [(x != x, 0.0 if x != x else x, text) for x, text in zip(numbers, key, strict=True)]


def _text(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _number_or_nan(value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        return np.nan


def _clusters(flops: np.ndarray, tolerance: float) -> np.ndarray:
    """Geometric means of runs of similar FLOPs, of at least three runs each."""
    ordered = np.sort(flops)
    breaks = np.flatnonzero(np.diff(np.log(ordered)) > np.log1p(tolerance)) + 1
    groups = [group for group in np.split(ordered, breaks) if len(group) >= 3]
    return np.array([np.exp(np.log(group).mean()) for group in groups])
