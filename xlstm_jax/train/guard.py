"""Updates that would do harm are discarded inside the step, before they reach the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.train.config import TrainConfig
from xlstm_jax.typing import Array, Bool, Float, Int, PyTree

_MEMORY = 0.98  # of the running mean of gradient norms: about fifty updates


class DivergedError(RuntimeError):
    """So many updates in a row were discarded that going on is pointless."""


class Guard(NamedTuple):
    """What the guard remembers between steps."""

    usual_norm: Float[Array, "*runs"]  # running mean of accepted gradient norms; 0: none yet
    skipped: Int[Array, "*runs"]  # updates discarded in a row

    @classmethod
    def start(cls) -> "Guard":
        """Nothing seen, nothing discarded."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def judge(
    guard: Guard, cfg: TrainConfig, loss: Float[Array, ""], grad_norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], Guard]:
    """Whether to take this update, and the guard after it.

    Taken are finite ones whose gradient norm is at most `guard_floor`, or at most `guard_factor`
    times the usual norm. Once `max_consecutive_skips` were discarded in a row none is taken any
    more: the parameters stay as they were until the host has noticed.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    limit = jnp.maximum(cfg.guard_factor * guard.usual_norm, cfg.guard_floor)
    fits = (grad_norm <= limit) | (guard.usual_norm == 0)
    ok = finite & fits & (guard.skipped < cfg.max_consecutive_skips)
    mean = jnp.where(
        guard.usual_norm == 0,
        grad_norm,
        _MEMORY * guard.usual_norm + (1 - _MEMORY) * grad_norm,
    ).astype(guard.usual_norm.dtype)
    return ok, Guard(
        usual_norm=jnp.where(ok, mean, guard.usual_norm),
        skipped=jnp.where(ok, 0, guard.skipped + 1),
    )


def keep_if(ok: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """`new` where `ok`, else `old`, leaf by leaf: no branch, so NaN in `new` does no harm."""
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
