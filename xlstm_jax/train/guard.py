"""Updates that would do harm are discarded inside the step, before they reach the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.train.config import TrainConfig
from xlstm_jax.typing import Array, Bool, Float, Int, PyTree

_EMA_DECAY = 0.98  # of the mean of gradient norms: about fifty updates


class DivergedError(RuntimeError):
    """So many updates in a row were discarded that training on is pointless."""


class Guard(NamedTuple):
    """What the guard carries between steps."""

    ema_grad_norm: Float[Array, "*runs"]  # moving mean of accepted gradient norms; 0: none yet
    skipped: Int[Array, "*runs"]  # updates discarded in a row

    @classmethod
    def start(cls) -> "Guard":
        """Nothing seen, nothing discarded."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def judge(
    guard: Guard, loss: Float[Array, ""], grad_norm: Float[Array, ""], cfg: TrainConfig
) -> tuple[Bool[Array, ""], Guard]:
    """Whether to apply this update, and the guard after it.

    An update is applied if it is finite and its gradient norm is at most `cfg.guard_floor`, or at
    most `cfg.guard_factor` times the moving mean. After `cfg.max_consecutive_skips` discarded in a
    row none is applied any more: the parameters stay as they were until the host has noticed.
    """
    mean = guard.ema_grad_norm
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    bound = jnp.maximum(cfg.guard_factor * mean, cfg.guard_floor)
    fits = (grad_norm <= bound) | (mean == 0)
    ok = finite & fits & (guard.skipped < cfg.max_consecutive_skips)
    updated = jnp.where(mean == 0, grad_norm, _EMA_DECAY * mean + (1 - _EMA_DECAY) * grad_norm)
    return ok, Guard(
        ema_grad_norm=jnp.where(ok, updated.astype(mean.dtype), mean),
        skipped=jnp.where(ok, 0, guard.skipped + 1),
    )


def keep_if(ok: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """`new` where `ok`, else `old`, leaf by leaf: no branch, so NaN in `new` does no harm."""
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
