"""RWKV-4: per channel a weighted mean of values, with an extra weight for the newest.

Source: Peng et al. 2023, arXiv:2305.13048, section 3 (WKV operator).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax.cells.logspace import NEG, state_dtype
from xlstm_jax.cells.time import scan_time, vary_like
from xlstm_jax.typing import Array, Flag, Float, Size


class WKVState(NamedTuple):
    """Carry of one RWKV-4 layer; the initial state is zeros. Leaves are float32 or wider."""

    c: Float[Array, "B F"]  # weighted sum of values, times exp(-m)
    n: Float[Array, "B F"]  # sum of weights, times exp(-m); 0 before the first step, then >= 1
    m: Float[Array, "B F"]  # log of the factor divided out; meaningless where n is 0


export.register_namedtuple_serialization(WKVState, serialized_name="xlstm_jax.WKVState")


def wkv_init(batch_size: Size, features: int, dtype: DTypeLike = jnp.float32) -> WKVState:
    """The initial state: zeros in every leaf, each in its own buffer, so that it can be donated."""
    return WKVState._make(jnp.zeros((batch_size, features), dtype) for _ in WKVState._fields)


def wkv_step(
    state: WKVState,
    k: Float[Array, "B F"],
    v: Float[Array, "B F"],
    log_decay: Float[Array, "F"],
    bonus: Float[Array, "F"],
) -> tuple[WKVState, Float[Array, "B F"]]:
    """One time step, in the argument order of `jax.lax.scan`.

    Args:
        state: after step t-1.
        k: log weight of the value.
        v: value.
        log_decay: log of the factor of all older weights, at most 0.
        bonus: added to the log weight of the newest value while it is the newest.

    Returns the state after step t, and the mean h_t in the dtype of the state.
    """
    dtype = state.c.dtype
    k, v, log_decay, bonus = (a.astype(dtype) for a in (k, v, log_decay, bonus))
    # In the initial state (n = 0) the old stabilizer must not count.
    m_old = jnp.where(state.n == 0, NEG, state.m)
    newest = k + bonus[None]
    m = jnp.maximum(m_old, newest)
    old, new = jnp.exp(m_old - m), jnp.exp(newest - m)
    h = (old * state.c + new * v) / (old * state.n + new)
    log_carry = m_old + log_decay[None]
    m = jnp.maximum(log_carry, k)
    # Both exponents are <= 0: nothing overflows, and n is at least 1.
    old, new = jnp.exp(log_carry - m), jnp.exp(k - m)
    return WKVState(old * state.c + new * v, old * state.n + new, m), h


def wkv_scan(
    k: Float[Array, "B T F"],
    v: Float[Array, "B T F"],
    log_decay: Float[Array, "F"],
    bonus: Float[Array, "F"],
    state: WKVState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
) -> tuple[Float[Array, "B T F"], WKVState]:
    """The recurrence over a sequence; `reset` and `mask` as in `scan_time`.

    Returns h in the dtype of v, and the state after the last step.
    """
    dtype = state_dtype(k, v, log_decay, bonus)
    state = wkv_init(k.shape[0], k.shape[-1], dtype) if state is None else state
    arrays = (k, v, log_decay, bonus, reset, mask)
    state = vary_like(jax.tree.map(lambda s: s.astype(dtype), state), arrays)

    def step(state, inputs):
        k, v = inputs
        return wkv_step(state, k, v, log_decay, bonus)

    h, state = scan_time(step, state, (k, v), reset=reset, mask=mask)
    return h.astype(v.dtype), state
