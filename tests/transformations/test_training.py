"""Training under transformations: many seeds at once, a linearized loss, loops of others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import quick
from tests.modules.models import config, model_and_variables
from tests.transformations.cases import assert_close
from xlstm_jax.data.batch import Batch
from xlstm_jax.modules import LM
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.train.losses import language_model_loss
from xlstm_jax.train.state import first_state
from xlstm_jax.train.step import make_train_step

CFG = TrainConfig(steps=4, warmup_steps=0)


def batch() -> Batch:
    ids = np.random.default_rng(0).integers(0, 11, (2, 7), dtype=np.int32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]], jnp.int32)
    weights = (segments > 0).astype(jnp.float32)
    inputs, targets = jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])
    return Batch(inputs, targets, segments, weights, jnp.arange(2))


@functools.cache
def model(letter: str = "m") -> LM:
    return LM(config(letter))


@functools.cache
def params(letter: str = "m", seed: int = 0):
    return model_and_variables(config(letter), seed)[1]["params"]


def loss(params, letter: str = "m"):
    return language_model_loss(model(letter), params, batch(), CFG)[0]


@pytest.mark.slow
@pytest.mark.parametrize("letter", "msM")
def test_train_step_under_vmap_over_seeds_equals_the_step_of_each_seed(letter):
    tx = optax.sgd(0.1)
    step = make_train_step(model(letter), tx, CFG)
    states = [first_state(params(letter, seed), tx) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    new, metrics = quick.jit(jax.vmap(step, (0, None)))(stacked, batch())
    one = quick.jit(step)
    for index, state in enumerate(states):
        expected = one(state, batch())
        actual = jax.tree.map(lambda x, index=index: x[index], (new, metrics))
        for part, reference in zip(actual, expected, strict=True):
            assert_close(part, reference, 1e-5)


@pytest.mark.parametrize("letter", ["M", *(pytest.param(x, marks=pytest.mark.slow) for x in "ms")])
def test_linearized_loss_equals_the_gradient(letter):
    primal = params(letter)
    tangent = jax.tree.map(jnp.cos, primal)

    def both(primal, tangent):
        value, linear = jax.linearize(functools.partial(loss, letter=letter), primal)
        gradient = jax.grad(loss)(primal, letter)
        return linear(tangent), optax.tree.vdot(gradient, tangent), value

    linear, expected, value = quick.jit(both)(primal, tangent)
    np.testing.assert_allclose(linear, expected, rtol=1e-4)
    assert np.isfinite(value)


@pytest.mark.slow
def test_loop_of_a_user_with_an_optimizer_of_second_order_reduces_the_loss():
    """`optax.lbfgs` evaluates the loss along a line, within its own `while_loop`."""
    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, updates), state), value

    run = quick.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=3)[1])
    losses = run(params())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("name", ["lion", "adafactor", "contrib.muon"])
def test_train_step_takes_any_optimizer_of_optax(name):
    make = functools.reduce(getattr, name.split("."), optax)
    tx = make(1e-3)
    step = make_train_step(model(), tx, CFG)
    state = jax.eval_shape(lambda: first_state(params(), tx))
    new, _ = jax.eval_shape(step, state, batch())
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.leaves(new) == jax.tree.leaves(state)
