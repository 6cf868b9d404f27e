"""Rewinds after a spike: the run returns to a checkpoint and leaves out the data after it.

Source: Chowdhery et al. 2022, arXiv:2204.02311, section 5.1. They restart about 100 steps before a
spike and leave out 200 to 500 batches, those before and during the spike.

A spike is `train.max_consecutive_skips` consecutive skipped updates, at which a run without rewinds
ends. A rewind is a function of the first skipped step and of the checkpoints at multiples of
`train.checkpoint_every`: a run that is killed after a rewind, and resumed before it, repeats it.
"""

from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from xlstm_jax.train import checkpoint, rundir
from xlstm_jax.train.checkpoint import Checkpointer
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.train.processes import log, sync_processes
from xlstm_jax.train.progress import Skips


def next_skip(run_dir: Path, cfg: TrainConfig, first: int, skips: Skips) -> tuple[int, int] | None:
    """The skip after a spike that began at step `first`; None if no rewinds are left.

    Its step is that of the checkpoint to return to.
    """
    if len(skips) >= cfg.spike_rewinds:
        return None
    step = _checkpoint_before(run_dir, cfg, first, after=skips[-1][0] if skips else 0)
    if jax.process_count() > 1:  # the disk may look different to other hosts
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    return None if step < 0 else (step, first + cfg.max_consecutive_skips)


def _checkpoint_before(run_dir: Path, cfg: TrainConfig, first: int, after: int) -> int:
    saved = [step for step in checkpoint.steps(run_dir) if step >= after]
    # Of the state before the spike, so that the skipped data differ from those that follow. During
    # a spike the parameters do not change, so a checkpoint within it is the last resort.
    before = [step for step in saved if step <= first] or saved[:1]
    # Signals and `checkpoint_minutes` save at other steps, which a repetition would not have.
    regular = [step for step in before if cfg.checkpoint_every and step % cfg.checkpoint_every == 0]
    return max(regular or before, default=-1)


def discard_after(run_dir: Path, checkpoints: Checkpointer, skip: tuple[int, int]) -> None:
    """Deletes checkpoints and records after the step of a skip; every process calls it."""
    step, end = skip
    checkpoints.rewind(step)
    if jax.process_index() == 0:
        rundir.drop_metrics(run_dir, step)
    sync_processes("the run is rewound")
    log.warning(
        "a spike ended at step %d: the run returns to step %d and leaves out the data of %d steps.",
        end, step, end - step,
    )  # fmt: skip
