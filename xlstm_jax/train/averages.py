"""Averages of the parameters: schedule-free optimizers, and exponential moving averages."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.train.schedules import Schedule, scheduled_rate
from xlstm_jax.typing import PyTree


def schedule_free(
    base: optax.GradientTransformation, schedule: Schedule, b1: float
) -> optax.GradientTransformationExtraArgs:
    """Trains with `base`, which has no momentum, and averages its parameters, by optax.

    The parameters of the train state are those of gradients, y = (1 - b1) z + b1 x. `base` updates
    z, and x is the average of all z so far, weighted by squares of the learning rate: evaluate x,
    which is `average_of`. Source: Defazio et al. 2024, arXiv:2405.15682.
    """

    def with_rate(rate: Any) -> optax.GradientTransformationExtraArgs:
        # A function, whose value optax converts to the dtype of its state; it gets optax's own
        # step count, which must not determine the rate.
        return optax.contrib.schedule_free(base, lambda count: rate, b1)

    def update(updates, state, params=None, **extra):
        rate = scheduled_rate(schedule, extra)
        return with_rate(rate).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(with_rate(0.0).init, update)


def average_of(trained: PyTree, opt_state: PyTree) -> PyTree:
    """The average of a schedule-free optimizer; of another one, the trained parameters."""
    average = schedule_free_state(opt_state)
    return trained if average is None else _average(average, trained)


@jax.jit  # one program, as the arrays may be sharded over several processes
def _average(state: Any, params: PyTree) -> PyTree:
    return optax.contrib.schedule_free_eval_params(state, params)


def schedule_free_state(opt_state: PyTree) -> Any:
    """The part of an optimizer state with the `z` of a schedule-free optimizer; None without."""
    kind = optax.contrib.ScheduleFreeState
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return next((leaf for leaf in leaves if isinstance(leaf, kind)), None)


def start_ema(params: PyTree) -> PyTree:
    """The moving average before the first step: a copy of the parameters, in float32 or wider."""
    return jax.tree.map(lambda p: jnp.array(p, state_dtype(p)), params)


def update_ema(ema: PyTree, params: PyTree, decay: float) -> PyTree:
    """The average decay * ema + (1 - decay) * params."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p.astype(e.dtype), ema, params)
