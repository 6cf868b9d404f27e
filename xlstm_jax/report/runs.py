"""What a report shows of a run."""

import dataclasses
from typing import Any, Literal

from xlstm_jax.report.series import Table

Status = Literal["finished", "diverged", "training", "stopped", "no records"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The final values of a run; None where it has none."""

    name: str  # unique among the compared runs
    path: str
    status: Status
    step: int
    steps: int | None  # of the complete run
    tokens_seen: int | None
    seconds: float | None  # in train steps: without compilation, evaluation and checkpoints
    num_params: int | None
    loss: float | None
    evaluation: dict[str, float]  # the last validation value by metric
    tokens_per_second: float | None  # median
    mfu: float | None  # median
    goodput: float | None
    skipped: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a report; its tables and gate statistics are thinned."""

    summary: Summary
    config: dict[str, Any]  # of config.json
    about: dict[str, Any]  # of run.json
    train: Table
    validation: Table
    gates: dict[str, Any]  # see `gates.collect`
