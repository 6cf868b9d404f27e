"""The guard: skips harmful updates inside the train step, before they reach the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.train.config import TrainConfig
from xlstm_jax.typing import Array, Bool, Float, Int, PyTree

_EMA_DECAY = 0.98  # of the average gradient norm: a window of about fifty updates


class DivergedError(RuntimeError):
    """Too many consecutive updates were skipped; the parameters are no longer trained."""


class Guard(NamedTuple):
    """The state of the guard between steps."""

    ema_grad_norm: Float[Array, "*runs"]  # average of accepted gradient norms; 0: none yet
    skipped: Int[Array, "*runs"]  # consecutive skipped updates

    @classmethod
    def start(cls) -> "Guard":
        """The state before the first step."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def check_update(
    guard: Guard, loss: Float[Array, ""], grad_norm: Float[Array, ""], cfg: TrainConfig
) -> tuple[Bool[Array, ""], Guard]:
    """Whether to apply an update, and the guard after it.

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
    # A skipped update leaves the average as it is, so that a spike cannot raise its own bound.
    return ok, Guard(
        ema_grad_norm=jnp.where(ok, updated.astype(mean.dtype), mean),
        skipped=jnp.where(ok, 0, guard.skipped + 1),
    )


def select(ok: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """`new` if `ok`, else `old`, for every leaf; NaN in `new` does not propagate."""
    # `where` and not `cond`, which under `vmap` becomes a select anyway.
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
