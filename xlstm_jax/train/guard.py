"""The guard: skips harmful updates inside the train step, before they reach the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.train.config import TrainConfig
from xlstm_jax.typing import Array, Bool, Float, Int, PyTree

_EMA_DECAY = 0.98  # of the average gradient norm: a window of about fifty updates


class DivergedError(RuntimeError):
    """Too many consecutive updates were skipped; the parameters are no longer trained."""


class Skip(NamedTuple):
    """A skipped update, which `xlstm-jax replay` recomputes."""

    step: Int[Array, "*runs"]  # -1: no update was skipped yet
    loss: Float[Array, "*runs"]
    grad_norm: Float[Array, "*runs"]


class Guard(NamedTuple):
    """The state of the guard between steps."""

    ema_grad_norm: Float[Array, "*runs"]  # average of accepted gradient norms; 0: none yet
    skipped: Int[Array, "*runs"]  # consecutive skipped updates
    first: Skip  # of the latest series of consecutive skipped updates

    @classmethod
    def start(cls) -> "Guard":
        """The state before the first step."""
        first = Skip(jnp.full((), -1, jnp.int32), *(jnp.zeros((), jnp.float32) for _ in range(2)))
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), first)


def check_update(
    guard: Guard,
    step: Int[Array, ""],
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    cfg: TrainConfig,
) -> tuple[Bool[Array, ""], Guard]:
    """Whether to apply the update of a step, and the guard after it.

    An update is applied if loss and gradient norm are finite and the norm is at most
    `cfg.guard_floor`, or at most `cfg.guard_factor` times its moving average. After
    `cfg.max_consecutive_skips` consecutive skipped updates all further ones are skipped: the host
    reads metrics with a delay, and the parameters must not change until it ends the run.
    """
    mean = guard.ema_grad_norm
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    bound = jnp.maximum(cfg.guard_factor * mean, cfg.guard_floor)
    # Before the first accepted update there is no average to compare with.
    in_bounds = (grad_norm <= bound) | (mean == 0)
    ok = finite & in_bounds & (guard.skipped < cfg.max_consecutive_skips)
    updated = jnp.where(mean == 0, grad_norm, _EMA_DECAY * mean + (1 - _EMA_DECAY) * grad_norm)
    begins = ~ok & (guard.skipped == 0)  # a series of skipped updates
    this = Skip(step, loss, grad_norm)
    # A skipped update leaves the average as it is, so that a spike cannot raise its own bound.
    return ok, Guard(
        ema_grad_norm=jnp.where(ok, updated.astype(mean.dtype), mean),
        skipped=jnp.where(ok, 0, guard.skipped + 1),
        first=jax.tree.map(
            lambda new, old: select(begins, new.astype(old.dtype), old), this, guard.first
        ),
    )


def select(ok: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """`new` if `ok`, else `old`, for every leaf; NaN in `new` does not propagate."""
    # `where` and not `cond`, which under `vmap` becomes a select anyway.
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
