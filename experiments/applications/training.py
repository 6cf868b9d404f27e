"""Training on random examples, for the applications: seed 0 is the test, 1 and up are the steps."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import record
from xlstm_jax.data import Batch
from xlstm_jax.train import TrainConfig

BATCH_SIZE = 64

MakeBatch = Callable[[int, int], Batch]
"""(seed, number of examples) -> random examples."""


def config(steps: int) -> TrainConfig:
    """The training of one model; the learning rate is an argument of `train_grid`."""
    return TrainConfig(steps=steps, warmup_steps=0.1, grad_clip=1.0, log_every=min(steps, 100))


def train(
    model: Any, make_batch: MakeBatch, steps: int, loss_fn: Callable[..., Any] | None = None
) -> Any:
    """The grid of one member, with its parameters; `loss_fn` as in `train_grid`."""
    from xlstm_jax.train.grid import train_grid

    def batches(first: int, count: int) -> Batch:
        parts = [make_batch(1 + step, BATCH_SIZE) for step in range(first, first + count)]
        return Batch(*map(np.stack, zip(*parts, strict=True)))

    return train_grid(
        model,
        config(steps),
        batches,
        seeds=(0,),
        lrs=(5e-3,),
        loss_fn=loss_fn,
        report=record.print_loss,
    )


def accuracy(
    model: Any, loss: Callable[..., Any], make_batch: MakeBatch, steps: int, num_test: int
) -> float:
    """Trains a model; returns the share of targets of `num_test` examples that it predicts.

    Args:
        loss: of `head_losses`, for this kind of model.
    """
    from xlstm_jax.train.grid import evaluate_grid

    loss_fn = functools.partial(loss, model)
    grid = train(model, make_batch, steps, loss_fn)
    test = [make_batch(0, num_test)]
    sums = evaluate_grid(model, grid.params, test, config(steps), loss_fn)
    return float(sums.correct_sum[0] / sums.weight_sum[0])
