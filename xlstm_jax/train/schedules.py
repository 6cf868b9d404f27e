"""Learning rate schedules."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xlstm_jax.train.config import TrainConfig
from xlstm_jax.typing import Array, ArrayLike, Float, Int

Schedule = Callable[[Int[ArrayLike, ""]], Float[ArrayLike, ""]]


def make_schedule(cfg: TrainConfig) -> Schedule:
    """The learning rate as a function of the step: linear warm-up, main part, linear cool-down.

    The warm-up starts at 0. The main part starts at `lr` and ends at `end_factor * lr`, or stays at
    `lr` if it is constant. The cool-down ends at `cooldown_lr` at step `steps`. Parts with 0 steps
    are omitted.
    """
    parts, lr, end = cfg.parts, cfg.lr, cfg.lr * cfg.end_factor
    length = max(parts.decay, 1)  # optax rejects 0, even for a part that is then omitted
    decay = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, end, length),
        "cosine": optax.cosine_decay_schedule(lr, length, cfg.end_factor),
        "exponential": optax.exponential_decay(lr, length, cfg.end_factor, end_value=end),
        "wsd": optax.linear_schedule(lr, end, length),
    }
    last = lr if cfg.schedule == "constant" or not parts.decay else end
    schedules = (
        optax.linear_schedule(0.0, lr, parts.warmup),
        optax.constant_schedule(lr),
        decay[cfg.schedule],
        optax.linear_schedule(last, cfg.cooldown_lr, parts.cooldown),
    )
    used = [(count, one) for count, one in zip(parts, schedules, strict=True) if count]
    # Every schedule counts from its own start; `join_schedules` takes the inner boundaries.
    ends = itertools.accumulate(count for count, _ in used)
    return optax.join_schedules([schedule for _, schedule in used], list(ends)[:-1])


def continued_end_factor(end_factor: float, old_decay_steps: int, new_decay_steps: int) -> float:
    """`end_factor` of an exponential decay that is extended to more steps at the same rate.

    A decay to 0.1 over 495,000 steps, extended to 540,000 steps, ends at 0.0811.
    """
    return end_factor ** (new_decay_steps / old_decay_steps)


def scheduled_rate(schedule: Schedule, extra: dict[str, Any]) -> Float[Array, ""]:
    """The learning rate for the extra arguments `step` and `lr_scale` of an update.

    A step count in the optimizer state, as in optax, would not advance when the guard skips an
    update and restores this state.
    """
    return jnp.asarray(schedule(extra["step"]) * extra.get("lr_scale", 1.0))


def scale_by_learning_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Scales updates by `-lr_scale * schedule(step)`, where `step` is an argument of `update`."""

    def update(updates, state, params=None, **extra):
        lr = scheduled_rate(schedule, extra)
        return jax.tree.map(lambda u: -lr.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
