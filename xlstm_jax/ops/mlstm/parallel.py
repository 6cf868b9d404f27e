"""mLSTM over all pairs of positions at once, with the log-space stabilizer matrix.

Quadratic in T; the implementation to read, and to compare others with. Its sums of log f have no
common start but run from one position to the next, so it loses the fewest digits of all forms.

Source: arXiv:2405.04517, appendix (parallel mLSTM).
"""

import jax.numpy as jnp

from pallas_kernels.mlstm.gates import NEG, READ_FLOOR, LogGates, log_gates, lower_bound
from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.cpu import materialize
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.typing import Array, Float


def mlstm_parallel(
    x: Inputs, state: MLSTMState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """The op `mlstm` over all pairs of positions; ignores `chunk_size`."""
    dtype, scale = state.C.dtype, x.q.shape[-1] ** -0.5
    # An operand of products, and possibly a broadcast constant: see `materialize`.
    state = materialize(state)
    q, k, v = (flags.zero_masked(a).astype(dtype) for a in x[:3])
    gates = log_gates(x.i, x.f, *flags, **options.gates, dtype=dtype)
    log_D, log_start, log_initial = _log_weights(gates, state.m)
    if options.max_state:
        m = jnp.maximum(jnp.maximum(jnp.max(log_D, axis=-1), log_start), log_initial)
    else:
        m = jnp.zeros_like(log_start)
    m_read = jnp.maximum(m, READ_FLOOR)
    scores = scale * exact_einsum("BTHK,BSHK->BHTS", q, k)
    # With an exponential gate m is the maximum of the log weights: exponents are <= 0.
    P = scores * jnp.exp(log_D - m_read[..., None])
    start = scale * jnp.exp(log_start - m_read)
    h = exact_einsum("BHTS,BSHV->BTHV", P, v)
    h = h + exact_einsum("BHT,BTHK,BHKV->BTHV", start, q, state.C)
    if options.normalize:
        d = jnp.sum(P, axis=-1) + start * exact_einsum("BTHK,BHK->BHT", q, state.n)
        norm = jnp.maximum(jnp.abs(d), lower_bound(m)) + options.eps
        h = h / jnp.swapaxes(norm, 1, 2)[..., None]
    # The weights of the last position, applied to keys and values, give the final state.
    m = m[..., -1]
    f_scaled = jnp.exp(log_start[..., -1] - m)
    keys = jnp.exp(log_D[..., -1, :] - m[..., None])[..., None] * jnp.swapaxes(k, 1, 2)
    C = f_scaled[..., None, None] * state.C + exact_einsum("BHSK,BSHV->BHKV", keys, v)
    n = f_scaled[..., None] * state.n + jnp.sum(keys, axis=-2)
    return flags.zero_masked(h).astype(x.v.dtype), MLSTMState(C, n, m)


def _log_weights(gates: LogGates, m_start: Float[Array, "B H"]):
    """Log weights of keys s for queries t `B H T S`, and of two states for queries `B H T`.

    The states are the one passed to the op, and the initial state that a reset leaves, whose m is 0
    (NEG where no reset precedes the query).
    """
    log_i, log_f = (jnp.swapaxes(g, 1, 2) for g in (gates.log_i, gates.log_f))
    T = log_i.shape[-1]
    t, s = jnp.arange(T)[:, None], jnp.arange(T)[None]
    # decay[t, s] is the sum of log f over s+1 .. t, and from_start[t] that over 0 .. t.
    steps = jnp.where((t > s)[None, None], log_f[..., :, None], 0)
    decay = jnp.cumsum(steps, axis=-2)
    from_start = decay[..., 0] + log_f[..., :1]
    visible = (t >= s)[None, None]
    if gates.reset is None:
        log_D = jnp.where(visible, decay + log_i[..., None, :], NEG)
        return log_D, from_start + m_start[..., None], NEG
    # Resets are a mask, not a large negative log f: a sum with one would lose its digits.
    segment = jnp.cumsum(gates.reset, axis=-1)[:, None]
    visible = visible & (segment[..., :, None] == segment[..., None, :])
    log_D = jnp.where(visible, decay + log_i[..., None, :], NEG)
    log_start = jnp.where(segment == 0, from_start + m_start[..., None], NEG)
    is_reset = visible & gates.reset[:, None, None, :]
    # At least NEG, so that m is never -inf: -inf - -inf is NaN.
    log_initial = jnp.where(is_reset, decay + log_f[..., None, :], NEG).max(axis=-1, initial=NEG)
    return log_D, log_start, log_initial
