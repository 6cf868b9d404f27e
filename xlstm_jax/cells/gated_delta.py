"""Gated delta rule: a matrix memory that replaces what it has stored under a key, and forgets.

Source: Yang et al. 2024, arXiv:2412.06464, section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax.cells.logspace import exact_einsum, state_dtype
from xlstm_jax.cells.time import scan_time, vary_like
from xlstm_jax.typing import Array, Flag, Float, Size


class GatedDeltaState(NamedTuple):
    """Carry of one gated delta net layer; the initial state is zeros. Float32 or wider."""

    S: Float[Array, "B H K V"]  # matrix memory


export.register_namedtuple_serialization(
    GatedDeltaState, serialized_name="xlstm_jax.GatedDeltaState"
)


def gated_delta_init(
    batch_size: Size, num_heads: int, qk_dim: int, v_dim: int, dtype: DTypeLike = jnp.float32
) -> GatedDeltaState:
    """The initial state: zeros."""
    return GatedDeltaState(jnp.zeros((batch_size, num_heads, qk_dim, v_dim), dtype))


def gated_delta_step(
    state: GatedDeltaState,
    q: Float[Array, "B groups K"],
    k: Float[Array, "B groups K"],
    v: Float[Array, "B H V"],
    log_decay: Float[Array, "B H"],
    beta: Float[Array, "B H"],
) -> tuple[GatedDeltaState, Float[Array, "B H V"]]:
    """One time step, in the argument order of `jax.lax.scan`.

    Args:
        state: after step t-1.
        q, k: query and key, each shared by the consecutive heads of a group; keys have norm 1, or
            the memory may grow.
        v: value.
        log_decay: log of the factor of the old memory, at most 0.
        beta: share of the stored value that is replaced, from 0 to 1.

    Returns the state after step t, and h_t in the dtype of the state.
    """
    q, k, v, log_decay, beta = (a.astype(state.S.dtype) for a in (q, k, v, log_decay, beta))
    q, k = (jnp.repeat(a, v.shape[1] // a.shape[1], axis=1) for a in (q, k))
    S = jnp.exp(log_decay)[..., None, None] * state.S
    change = beta[..., None] * (v - exact_einsum("BHK,BHKV->BHV", k, S))
    S = S + k[..., None] * change[..., None, :]
    return GatedDeltaState(S), exact_einsum("BHK,BHKV->BHV", q * q.shape[-1] ** -0.5, S)


def gated_delta_scan(
    q: Float[Array, "B T groups K"],
    k: Float[Array, "B T groups K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    state: GatedDeltaState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
) -> tuple[Float[Array, "B T H V"], GatedDeltaState]:
    """The recurrence over a sequence; `reset` and `mask` as in `scan_time`.

    Returns h in the dtype of v, and the state after the last step.
    """
    inputs = (q, k, v, log_decay, beta)
    dtype = state_dtype(*inputs)
    if state is None:
        state = gated_delta_init(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1], dtype)
    state = vary_like(jax.tree.map(lambda s: s.astype(dtype), state), (inputs, reset, mask))

    def step(state, inputs):
        return gated_delta_step(state, *inputs)

    h, state = scan_time(step, state, inputs, reset=reset, mask=mask)
    return h.astype(v.dtype), state
