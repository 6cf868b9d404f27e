"""AdamW with decay by parameter path, and learning rates as pure functions of the step."""

import itertools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from xlstm_jax.sharding.axes import path_name
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.typing import Array, ArrayLike, Float, Int, PyTree

Schedule = Callable[[Int[ArrayLike, ""]], Float[ArrayLike, ""]]


def make_schedule(cfg: TrainConfig) -> Schedule:
    """The learning rate of each step: linear warm-up from 0, main part, linear cool-down.

    The main part starts at `lr` and ends at `end_factor * lr` (a constant one stays at `lr`); the
    cool-down goes from there to `cooldown_lr`, which it reaches at step `steps`. Parts of no steps
    are left out.
    """
    parts, lr, end = cfg.parts, cfg.lr, cfg.lr * cfg.end_factor
    length = max(parts.decay, 1)  # optax refuses 0, also where the part is then left out
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
    ends = itertools.accumulate(count for count, _ in used)
    return optax.join_schedules([schedule for _, schedule in used], list(ends)[:-1])


def continued_end_factor(end_factor: float, old_decay_steps: int, new_decay_steps: int) -> float:
    """`end_factor` for an exponential decay continued at the same rate to more steps.

    Reaching 0.1 after 495,000 steps and continuing to 540,000 ends at 0.0811.
    """
    return end_factor ** (new_decay_steps / old_decay_steps)


def decay_mask(params: PyTree, pattern: str = TrainConfig.decay_pattern) -> PyTree:
    """For each parameter, whether weight decay touches it: whether `pattern` is in its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: re.search(pattern, path_name(path)) is not None, params
    )


def make_optimizer(cfg: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW: clip by global norm, Adam, decoupled decay, learning rate.

    `update` takes `step`, which the schedule is a function of, and `lr_scale`, a factor on the
    learning rate. Both are values, so one program serves a whole vmapped grid of learning rates.
    """
    return optax.chain(
        optax.identity() if cfg.grad_clip is None else optax.clip_by_global_norm(cfg.grad_clip),
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(
            cfg.weight_decay, mask=lambda params: decay_mask(params, cfg.decay_pattern)
        ),
        scale_by_learning_rate(make_schedule(cfg)),
    )


def scale_by_learning_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Descent by `lr_scale * schedule(step)`, with the step given and not counted.

    A count of its own would stand still whenever the guard restores the optimizer's state.
    """

    def update(updates, state, params=None, **extra):
        lr = jnp.asarray(schedule(extra["step"]) * extra.get("lr_scale", 1.0))
        return jax.tree.map(lambda u: -lr.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def norm(tree: PyTree) -> Float[Array, ""]:
    """Square root of the sum of squares of all leaves, in float32 or wider."""
    return optax.tree.norm(
        jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
    )
