"""Grids of seeds and learning rates: each member is the run that it would be alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.data.batch import Batch
from xlstm_jax.errors import ArgumentError
from xlstm_jax.modules import LM, LMConfig
from xlstm_jax.modules.initializers import random_key
from xlstm_jax.train import losses
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.train.grid import evaluate_grid, train_grid
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.state import init_state
from xlstm_jax.train.step import make_train_step

MODEL = LM(LMConfig(vocab_size=7, dim=4, pattern="l"))
CFG = TrainConfig(steps=5, log_every=2, warmup_steps=2, end_factor=0.5)


def batches(first, count):
    tokens = np.random.default_rng([1, first]).integers(0, 7, (5, 3, 9), np.int32)[:count]
    ones = np.ones((count, 3, 8), np.int32)
    index = np.zeros((count, 3), np.int64)
    return Batch(tokens[..., :-1], tokens[..., 1:], ones, ones.astype(np.float32), index)


def alone(seed, lr, end_lr):
    """Losses and parameters of one run with an ordinary train step."""
    cfg = dataclasses.replace(CFG, lr=lr, end_factor=end_lr / lr)
    tx = make_optimizer(cfg)
    state = init_state(MODEL, tx, random_key(seed), jnp.zeros((1, 1), jnp.int32))
    step = jax.jit(make_train_step(MODEL, tx, cfg))
    losses = []
    for first in range(0, cfg.steps, cfg.log_every):
        count = min(cfg.log_every, cfg.steps - first)
        for i in range(count):
            state, metrics = step(state, jax.tree.map(lambda x, i=i: x[i], batches(first, count)))
            losses.append(metrics["loss"])
    return np.array(losses), state.params


def test_every_member_is_the_run_of_its_seed_and_learning_rate():
    reports = []

    def report(step, loss):
        reports.append((step, loss))

    options = dict(seeds=(3, 0), lrs=(0.1, 0.01), end_lr=0.005)
    grid = train_grid(MODEL, CFG, batches, **options, report=report)
    assert [*zip(grid.seeds, grid.lrs, strict=True)] == [(3, 0.1), (3, 0.01), (0, 0.1), (0, 0.01)]
    for i, (seed, lr) in enumerate(zip(grid.seeds, grid.lrs, strict=True)):
        losses, params = alone(seed, lr, 0.005)
        np.testing.assert_allclose(grid.losses[:, i], losses, rtol=1e-4)
        for a, b in zip(*map(jax.tree.leaves, (grid.member(i), params)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)
    assert [step for step, _ in reports] == [2, 4, 5]
    np.testing.assert_allclose(reports[-1][1], grid.losses[4], rtol=1e-6)


def test_large_gradients_are_clipped_and_those_that_are_not_finite_end_a_member():
    """The guard of a run would skip all steps after the first one."""
    cfg = dataclasses.replace(CFG, steps=12)

    def growing(first, count):
        index = np.arange(first, first + count)[:, None].repeat(3, axis=1)
        return batches(first, count)._replace(index=index)

    def loss_fn(params, batch, key):
        loss, sums = losses.language_model_loss(MODEL, params, batch, cfg)
        sign = jnp.where(params["lm_head"]["kernel"][0, 0] > 0, 1, jnp.nan)
        return loss * sign * jnp.where(batch.index[0] == 0, 1, 1e4), sums

    grid = train_grid(MODEL, cfg, growing, seeds=tuple(range(6)), lrs=(1e-3,), loss_fn=loss_fn)
    is_nan = np.asarray(grid.params["lm_head"]["kernel"])[:, 0, 0] <= 0
    assert 0 < is_nan.sum() < 6
    np.testing.assert_array_equal(grid.diverged, is_nan)


@pytest.mark.slow
def test_evaluation_sums_the_batches_of_each_member():
    grid = train_grid(MODEL, CFG, batches, seeds=(0, 1), lrs=(0.1,))
    parts = [jax.tree.map(lambda x, i=i: x[i], batches(7, 2)) for i in range(2)]
    sums = evaluate_grid(MODEL, grid.params, parts, CFG)
    assert sums.weight_sum.tolist() == [48, 48]
    for i in range(2):
        logits = [
            MODEL.apply({"params": grid.member(i)}, jnp.asarray(part.inputs))[0] for part in parts
        ]
        nats = [
            -jnp.take_along_axis(jax.nn.log_softmax(x), part.targets[..., None], axis=-1).sum()
            for x, part in zip(logits, parts, strict=True)
        ]
        np.testing.assert_allclose(sums.ce_sum[i], sum(nats), rtol=1e-5)


@pytest.mark.parametrize("seeds, lrs", [((), (0.1,)), ((0, 0), (0.1,)), ((0,), (0.1, 0.1))])
def test_members_without_or_with_equal_coordinates_are_refused(seeds, lrs):
    with pytest.raises(ArgumentError, match="at least one value and none twice"):
        train_grid(MODEL, CFG, batches, seeds=seeds, lrs=lrs)


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(ArgumentError, match="at least one batch"):
        evaluate_grid(MODEL, {}, [], CFG)
