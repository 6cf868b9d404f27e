"""What `xlstm-jax replay` needs to recompute a skipped step.

RUN/diverged.json              the first skipped step, its loss, gradient norm and windows
RUN/diverged/config.json       config of the run
RUN/diverged/batch.npz         batch of that step, unless it came from an iterator
RUN/diverged/checkpoints/STEP  state before that step, if the run diverged
"""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xlstm_jax.config import ConfigError, check_fields, from_dict, read_json, to_dict, with_imports
from xlstm_jax.data.batch import Batch
from xlstm_jax.errors import quote, quote_path
from xlstm_jax.train import rundir
from xlstm_jax.train.batches import TrainBatches
from xlstm_jax.train.checkpoint import Checkpointer
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.processes import sync_processes
from xlstm_jax.train.state import TrainState

FOLDER, BATCH = "diverged", "batch.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dump:
    """The contents of RUN/diverged.json."""

    first_skipped_step: int  # of the latest series of skipped updates
    loss: float | str  # of that step; "nan", "inf" or "-inf" if it is not finite
    grad_norm: float | str
    ema_grad_norm: float  # average of accepted gradient norms
    index_of_step: dict[str, list[int] | None]  # windows of the skipped steps; None: unknown
    diverged: bool  # whether the run ended, and its state is in FOLDER
    seed: int  # of dropout, with the step
    skips: list[tuple[int, int]]  # of data, by earlier rewinds
    data: dict[str, Any]  # description
    given: list[str]  # arguments of `fit` that replace parts of the config
    versions: dict[str, str]

    def __post_init__(self):
        check_fields(self, "", {"at least 0": "first_skipped_step ema_grad_norm"})
        for name in ("loss", "grad_norm"):
            if isinstance(value := getattr(self, name), str) and value not in _NON_FINITE:
                raise ConfigError(f"{name} must be a number, got {quote(value)}.")


_NON_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers


def read(path: Path) -> Dump:
    """Reads a dump; raises ConfigError, with the path, unless the file is one."""
    if not path.is_file():
        raise ConfigError(
            f"{quote_path(path)} must be the {rundir.DIVERGED} of a run, but does not exist; a run "
            "that has skipped no step has none."
        )
    values = read_json(path)
    try:
        return from_dict(Dump, values)
    except ConfigError as error:
        raise ConfigError(f"{quote_path(path)} is not a dump of this version: {error}") from error


def write(
    run_dir: Path,
    cfg: ExperimentConfig,
    state: TrainState,
    progress: dict[str, Any],
    train: TrainBatches,
    given: tuple[str, ...],
) -> None:
    """Dumps the first step of the latest series of skipped updates; every process calls it.

    Skipped updates leave parameters and moments as they were. During a series, `state` is therefore
    the state before its first step, except for the count of steps.

    Args:
        progress: that of a checkpoint of `state`.
        given: arguments of `fit` that replace parts of the config.
    """
    first, skipped = state.guard.first, int(state.guard.skipped)
    step, limit = int(first.step), cfg.train.max_consecutive_skips
    diverged, is_first = skipped >= limit, jax.process_index() == 0
    folder = run_dir / FOLDER
    if is_first:
        shutil.rmtree(folder, ignore_errors=True)
    sync_processes("the last dump is deleted")
    if diverged:
        with Checkpointer(folder, keep=1) as checkpoints:
            guard = state.guard._replace(skipped=0 * state.guard.skipped)
            before = state.replace(step=first.step, guard=guard)
            checkpoints.save(step, before, progress | {"step": step}, to_dict(cfg))
    if not is_first:
        return
    folder.mkdir(exist_ok=True)
    rundir.write_json(folder / rundir.CONFIG, with_imports(to_dict(cfg)))
    if (batch := train.batch(step)) is not None:
        np.savez(folder / BATCH, **batch._asdict())
    steps = range(step, step + min(max(skipped, 1), limit))
    values = Dump(
        first_skipped_step=step,
        loss=_number(first.loss),
        grad_norm=_number(first.grad_norm),
        ema_grad_norm=float(state.guard.ema_grad_norm),
        index_of_step={str(step): train.index_of(step) for step in steps},
        diverged=diverged,
        seed=cfg.train.seed,
        skips=progress["skips"],
        data=train.description,
        given=[*given, *(["data"] if train.index_of(step) is None else [])],
        versions=rundir.versions(),
    )
    rundir.write_json(run_dir / rundir.DIVERGED, to_dict(values))


def _number(value: jax.Array) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


def read_batch(path: Path, cfg: ExperimentConfig, step: int) -> Batch | None:
    """The batch of a dump; None if it has none, ConfigError if it is damaged."""
    if not path.is_file():
        return None
    shape = cfg.batch_sizes.at(step), cfg.data.seq_len
    try:
        with path.open("rb") as file:  # NumPy does not close a damaged one
            batch = Batch(**np.load(file))
    # zip and NumPy raise many types of exception for a damaged file.
    except Exception as error:
        raise ConfigError(f"{quote_path(path)} cannot be read ({error}); restore it.") from error
    if any(leaf.shape != shape[: leaf.ndim] for leaf in batch):
        raise ConfigError(
            f"{quote_path(path)} must have a batch of {shape[0]} x {shape[1]} tokens; restore it."
        )
    return batch
