"""mLSTM with all pairs of positions at once: the log-space stabiliser matrix, written out.

Quadratic in T; the form to read, and to compare others with. Its sums of log f run from one
position to the next, so it keeps the most digits of all forms.

Source: arXiv:2405.04517, appendix (parallel mLSTM).
"""

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import NEG
from xlstm_jax.cells.mlstm import READ_FLOOR, TINY, MLSTMState
from xlstm_jax.ops.mlstm_gates import LogGates, log_gates
from xlstm_jax.ops.once import stored
from xlstm_jax.typing import Array, Bool, Float


def mlstm_parallel(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    i: Float[Array, "B T H"],
    f: Float[Array, "B T H"],
    state: MLSTMState,
    *,
    reset: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    input_gate: str = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """The op `mlstm` over all pairs of positions; arguments as in `ops.mlstm`."""
    del chunk_size  # one chunk, as long as the sequence
    dtype, scale = state.C.dtype, q.shape[-1] ** -0.5
    state = stored(state)
    if mask is not None:
        q, k, v = (jnp.where(mask[..., None, None], a, 0) for a in (q, k, v))
    out_dtype = v.dtype
    q, k, v = (a.astype(dtype) for a in (q, k, v))
    gates = log_gates(i, f, reset, mask, input_gate=input_gate, dtype=dtype)
    log_D, log_start, empty = _log_weights(gates, state.m)
    if input_gate == "exp":
        m = jnp.maximum(jnp.maximum(jnp.max(log_D, axis=-1), log_start), empty)
    else:
        m = jnp.zeros_like(log_start)
    read = jnp.maximum(m, READ_FLOOR)
    dots = scale * jnp.einsum("BTHK,BSHK->BHTS", q, k, precision=_EXACT)
    P = dots * jnp.exp(log_D - read[..., None])
    start = scale * jnp.exp(log_start - read)
    h = jnp.einsum("BHTS,BSHV->BTHV", P, v, precision=_EXACT)
    h = h + jnp.einsum("BHT,BTHK,BHKV->BTHV", start, q, state.C, precision=_EXACT)
    if normalize:
        d = jnp.sum(P, axis=-1) + start * jnp.einsum("BTHK,BHK->BHT", q, state.n, precision=_EXACT)
        norm = jnp.maximum(jnp.maximum(jnp.abs(d), jnp.exp(-read)), TINY) + eps
        h = h / jnp.swapaxes(norm, 1, 2)[..., None]
    if mask is not None:
        h = jnp.where(mask[..., None, None], h, 0)
    return h.astype(out_dtype), _last_state(k, v, log_D, log_start, m, state)


_EXACT = jax.lax.Precision.HIGHEST


def _log_weights(gates: LogGates, m_start: Float[Array, "B H"]):
    """Log weights of source s in row t `B H T S`, of the given state `B H T`, of an empty one.

    The last is what a reset leaves: a memory of nothing, whose m is 0.
    """
    log_i, log_f = (jnp.swapaxes(g, 1, 2) for g in (gates.log_i, gates.log_f))
    T = log_i.shape[-1]
    t, s = jnp.arange(T)[:, None], jnp.arange(T)[None]
    # Column s holds the sum of log f over s+1 .. t, and column 0 of `whole` that over 0 .. t.
    steps = jnp.where((t > s)[None, None], log_f[..., :, None], 0)
    between = jnp.cumsum(steps, axis=-2)
    whole = between[..., 0] + log_f[..., :1]
    seen = (t >= s)[None, None]
    if gates.reset is None:
        return jnp.where(seen, between + log_i[..., None, :], NEG), whole + m_start[..., None], NEG
    segment = jnp.cumsum(gates.reset, axis=-1)[:, None]
    seen = seen & (segment[..., :, None] == segment[..., None, :])
    log_D = jnp.where(seen, between + log_i[..., None, :], NEG)
    log_start = jnp.where(segment == 0, whole + m_start[..., None], NEG)
    cleared = seen & gates.reset[:, None, None, :]
    empty = jnp.max(jnp.where(cleared, between + log_f[..., None, :], NEG), axis=-1)
    return log_D, log_start, empty


def _last_state(k, v, log_D, log_start, m, state: MLSTMState) -> MLSTMState:
    """The memory after the last step: its row of weights, on keys and values."""
    m = m[..., -1]
    kept = jnp.exp(log_start[..., -1] - m)
    keys = jnp.exp(log_D[..., -1, :] - m[..., None])[..., None] * jnp.swapaxes(k, 1, 2)
    C = kept[..., None, None] * state.C + jnp.einsum("BHSK,BSHV->BHKV", keys, v, precision=_EXACT)
    return MLSTMState(C, kept[..., None] * state.n + jnp.sum(keys, axis=-2), m)
