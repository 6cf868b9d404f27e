"""mLSTM with all pairs of positions at once: the log-space stabilizer matrix, written out.

Quadratic in T; the form to read, and to compare others with. Its sums of log f run from one
position to the next, so it keeps the most digits of all forms.

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
    """The op `mlstm` over all pairs of positions; `chunk_size` has no meaning here."""
    dtype, scale = state.C.dtype, x.q.shape[-1] ** -0.5
    # A product reads it: see `materialize` on operands that are one value repeated.
    state = materialize(state)
    q, k, v = (flags.zero_masked(a).astype(dtype) for a in x[:3])
    gates = log_gates(x.i, x.f, *flags, input_gate=options.input_gate, dtype=dtype)
    log_D, log_start, empty = _log_weights(gates, state.m)
    if options.max_state:
        m = jnp.maximum(jnp.maximum(jnp.max(log_D, axis=-1), log_start), empty)
    else:
        m = jnp.zeros_like(log_start)
    read = jnp.maximum(m, READ_FLOOR)
    dots = scale * exact_einsum("BTHK,BSHK->BHTS", q, k)
    P = dots * jnp.exp(log_D - read[..., None])
    start = scale * jnp.exp(log_start - read)
    h = exact_einsum("BHTS,BSHV->BTHV", P, v)
    h = h + exact_einsum("BHT,BTHK,BHKV->BTHV", start, q, state.C)
    if options.normalize:
        d = jnp.sum(P, axis=-1) + start * exact_einsum("BTHK,BHK->BHT", q, state.n)
        norm = jnp.maximum(jnp.abs(d), lower_bound(m)) + options.eps
        h = h / jnp.swapaxes(norm, 1, 2)[..., None]
    # The state after the last step: its row of weights, on keys and values.
    m = m[..., -1]
    f_scaled = jnp.exp(log_start[..., -1] - m)
    keys = jnp.exp(log_D[..., -1, :] - m[..., None])[..., None] * jnp.swapaxes(k, 1, 2)
    C = f_scaled[..., None, None] * state.C + exact_einsum("BHSK,BSHV->BHKV", keys, v)
    n = f_scaled[..., None] * state.n + jnp.sum(keys, axis=-2)
    return flags.zero_masked(h).astype(x.v.dtype), MLSTMState(C, n, m)


def _log_weights(gates: LogGates, m_start: Float[Array, "B H"]):
    """Log weights of source s in row t `B H T S`, of the given state `B H T`, of an empty one.

    The last is what a reset leaves: the initial state, whose m is 0.
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
