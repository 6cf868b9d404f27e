"""Runs that differ in seed and learning rate, trained and evaluated by one compiled program each.

The runs of a grid, its members, have equal shapes and see the same batches, so that all of them
are one program under `jax.vmap`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.data import DataConfig, batch_at
from xlstm_jax.data.batch import Batch, Examples
from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.modules.initializers import random_key
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.train import losses
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.train.grid_saves import GridSaves
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.schedules import make_schedule
from xlstm_jax.train.state import TrainState, init_state
from xlstm_jax.train.step import LossFn, make_train_step
from xlstm_jax.typing import Bool, Float, PyTree

Report = Callable[[int, Float[np.ndarray, "M"]], None]


class Grid(NamedTuple):
    """M trained members; those of `train_grid`: `seeds[0]` with every learning rate, ..."""

    params: PyTree  # with a leading axis M
    losses: Float[np.ndarray, "steps M"]  # of training, in nats per token
    seeds: tuple[int, ...]  # of each member
    lrs: tuple[float, ...]  # of each member
    diverged: Bool[np.ndarray, "M"]  # whether its last updates were skipped, as not finite

    def member(self, index: int) -> PyTree:
        """The parameters of one member."""
        return jax.tree.map(lambda leaf: leaf[index], self.params)


def batches_of(
    examples: Examples, cfg: DataConfig, num_samples: int | None = None
) -> Callable[[int, int], Batch]:
    """The batches of a grid: (first step, number of steps) -> those of these steps, stacked.

    Args:
        num_samples: how many samples of a synthetic task are repeated; None: all are new.
    """
    B = cfg.batch_size

    def batches(first: int, count: int) -> Batch:
        if examples.shuffle:
            parts = [batch_at(examples, cfg, step) for step in range(first, first + count)]
            return Batch(*map(np.stack, zip(*parts, strict=True)))
        index = np.arange(first * B, (first + count) * B)
        flat = examples.batch(index if num_samples is None else index % num_samples)
        return Batch(*(leaf.reshape(count, B, *leaf.shape[1:]) for leaf in flat))

    return batches


def train_grid(
    model: Any,
    cfg: TrainConfig,
    batches: Callable[[int, int], Batch],
    *,
    seeds: Sequence[int],
    lrs: Sequence[float],
    end_lr: float | None = None,
    loss_fn: LossFn | None = None,
    report: Report | None = None,
) -> Grid:
    """Trains every seed with every learning rate.

    Each member follows the schedule of `cfg` with its own peak. The members draw the same dropout
    masks; only their initial parameters depend on the seed. An update that is not finite is
    skipped; one with a large gradient is only clipped, as a member with a high learning rate may
    recover.

    Args:
        model: an `LM`, or a module that is called with the inputs of a batch.
        cfg: its `lr`, `seed` and `guard_floor` are not used; the others hold for all members.
        batches: (first step, number of steps) -> the batches of these steps with a leading axis.
            Steps are computed `cfg.log_every` at a time.
        end_lr: the learning rate at the end of the schedule; None: `cfg.end_factor` of the peak.
        loss_fn: as that of `make_train_step`.
        report: called with the number of finished steps and the mean loss of each member since
            the last call.

    Raises:
        ArgumentError: no seed or no learning rate is given, or one is given twice.
    """
    for name, values in (("seeds", seeds), ("lrs", lrs)):
        if not values or len(set(values)) < len(values):
            raise ArgumentError(
                f"{name} must have at least one value and none twice, got {quote(tuple(values))}; "
                "each combination of a seed and a learning rate is one run."
            )
    members = [(seed, lr) for seed in seeds for lr in lrs]
    options: dict[str, Any] = dict(end_lr=end_lr, loss_fn=loss_fn, report=report)
    return train_members(model, cfg, batches, members, **options)


def train_members(
    model: Any,
    cfg: TrainConfig,
    batches: Callable[[int, int], Batch],
    members: Sequence[tuple[int, float]],
    *,
    end_lr: float | None = None,
    loss_fn: LossFn | None = None,
    report: Report | None = None,
    run_dir: Path | None = None,
) -> Grid:
    """As `train_grid`, of any pairs of a seed and a learning rate.

    Args:
        run_dir: folder of the newest state of all members, saved as `cfg.checkpoint_every` and
            `checkpoint_minutes` say, at multiples of `log_every`, and at the end. The same call
            continues from it, bit for bit.

    Raises:
        ConfigError: the state in `run_dir` is of other members.
        CheckpointError: that state cannot be read.
        OSError: the disk is full or failed; the last complete state is intact.
    """
    rates = jnp.asarray(np.stack([_rates(cfg, lr, end_lr) for _, lr in members], axis=1))
    run, states = _program(model, cfg, loss_fn, [seed for seed, _ in members], batches(0, 1))
    with GridSaves(run_dir, cfg, members) as saves:
        states, losses = saves.restore(states)
        for first in range(len(losses), cfg.steps, cfg.log_every):
            count = min(cfg.log_every, cfg.steps - first)
            states, new = run(states, batches(first, count), rates[first : first + count])
            losses = np.concatenate([losses, new])
            saves.save_if_due(states, losses)
            if report is not None:
                report(first + count, losses[first:].mean(axis=0))
    diverged = np.asarray(states.guard.skipped) >= cfg.max_consecutive_skips
    member_seeds, member_lrs = zip(*members, strict=True)
    return Grid(states.params, losses, member_seeds, member_lrs, diverged)


def _program(model: Any, cfg: TrainConfig, loss_fn: LossFn | None, seeds: list[int], example):
    """The compiled steps of a grid, and its initial states."""
    # With a constant schedule of 1, lr_scale is the learning rate itself, which may then differ
    # between members in more than a factor.
    constant: dict[str, Any] = dict(schedule="constant", lr=1.0, warmup_steps=0, cooldown_steps=0)
    cfg = dataclasses.replace(cfg, **constant, guard_floor=float(np.finfo(np.float32).max))
    tx = make_optimizer(cfg)
    keys = jnp.stack([random_key(seed) for seed in seeds])
    inputs = jax.tree.map(lambda x: jnp.asarray(x[0, :1]), example.inputs)
    states = jax.vmap(lambda key: init_state(model, tx, key, inputs, freeze=cfg.freeze))(keys)
    update = jax.vmap(make_train_step(model, tx, cfg, loss_fn), in_axes=(0, None))

    def body(states: TrainState, inputs):
        batch, rates = inputs
        states, metrics = update(states.replace(lr_scale=rates), batch)
        return states, metrics["loss"]

    @functools.partial(jax.jit, donate_argnums=0)
    def run(states, batches, rates):
        return jax.lax.scan(body, states, (batches, rates))

    return run, states


def _rates(cfg: TrainConfig, lr: float, end_lr: float | None) -> Float[np.ndarray, "steps"]:
    """The learning rate of each step."""
    end_factor = cfg.end_factor if end_lr is None else end_lr / lr
    schedule = make_schedule(dataclasses.replace(cfg, lr=lr, end_factor=end_factor))
    return np.asarray(jax.vmap(schedule)(jnp.arange(cfg.steps)), np.float32)


def evaluate_grid(
    model: Any,
    params: PyTree,
    batches: Iterable[Batch],
    cfg: TrainConfig,
    loss_fn: LossFn | None = None,
) -> CrossEntropy:
    """The sums of every member over batches, each of shape [M]; without dropout.

    Args:
        params: with a leading axis M.
        cfg: that of training.
        loss_fn: as that of `make_train_step`; it is called without a dropout key.
    """

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def sums_of(params: PyTree, batch: Batch) -> CrossEntropy:
        if loss_fn is None:
            return losses.language_model_loss(model, params, batch, cfg)[1]
        return loss_fn(params, batch, None)[1]

    total: Any = None
    for batch in batches:
        sums = jax.tree.map(np.float64, jax.device_get(sums_of(params, batch)))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None:
        raise ArgumentError("batches must have at least one batch, got none; pass some.")
    return total
