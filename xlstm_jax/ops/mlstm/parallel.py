"""mLSTM over all pairs of positions at once, with the log-space stabilizer matrix.

Quadratic in T; the implementation to read, and to compare others with. Its sums of log f have no
common start but run from one position to the next, so it loses the fewest digits of all forms.
Autodiff computes the gradients.

Source: arXiv:2405.04517, appendix (parallel mLSTM).
"""

import jax.numpy as jnp

from pallas_kernels.mlstm import gates as pre
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
    gates = pre.log_gates(x.i, x.f, *flags, **options.gates, dtype=dtype)
    if not options.max_state:
        # States of this op have m = 0; the caller's may have another m.
        state = MLSTMState(*pre.fold_stabilizer(*state))
    log_D, log_start, m = _log_weights(gates, state.m, options)
    m_read = jnp.maximum(m, pre.READ_FLOOR)
    lift = m - m_read
    # Log weights are relative to m, so exponents are <= 0, whatever the gates are.
    scores = scale * exact_einsum("BTHK,BSHK->BHTS", q, k)
    P = scores * jnp.exp(log_D + lift[..., None])
    start = scale * jnp.exp(log_start + lift)
    h = exact_einsum("BHTS,BSHV->BTHV", P, v)
    h = h + exact_einsum("BHT,BTHK,BHKV->BTHV", start, q, state.C)
    if options.normalize:
        d = jnp.sum(P, axis=-1) + start * exact_einsum("BTHK,BHK->BHT", q, state.n)
        norm = jnp.maximum(jnp.abs(d), pre.lower_bound(m)) + options.eps
        h = h / jnp.swapaxes(norm, 1, 2)[..., None]
    # The weights of the last position, applied to keys and values, give the final state.
    f_scaled = jnp.exp(log_start[..., -1])
    keys = jnp.exp(log_D[..., -1, :])[..., None] * jnp.swapaxes(k, 1, 2)
    C = f_scaled[..., None, None] * state.C + exact_einsum("BHSK,BSHV->BHKV", keys, v)
    n = f_scaled[..., None] * state.n + jnp.sum(keys, axis=-2)
    return flags.zero_masked(h).astype(x.v.dtype), MLSTMState(C, n, m[..., -1])


def _log_weights(gates: pre.LogGates, m_start: Float[Array, "B H"], options: Options):
    """Relative to m: log weights of keys s for queries t `B H T S`, and of the state `B H T`.

    Also returns m after every position, `B H T`.
    """
    T = gates.log_i.shape[1]
    # The sequence is a chunk: `B H 1 T`.
    gates = pre.in_chunks(gates, T)
    m, start, _ = pre.stabilizers(gates, m_start, max_state=options.max_state)
    parts, rounded, rounded_start = pre.relative_steps(
        gates, m, start, forget_gate=options.forget_gate
    )
    t, s = jnp.arange(T)[:, None], jnp.arange(T)[None]
    key, query = jnp.maximum(gates.log_i, pre.NEG) - rounded, rounded - m
    log_D = query[..., :, None] + key[..., None, :]
    log_start = query + (start - rounded_start)[..., None]
    for part in parts:
        # Sums over s+1 .. t start at s: gradients before a reset are exactly 0.
        steps = jnp.where(jnp.expand_dims(t > s, (0, 1, 2)), part[..., :, None], 0)
        log_D = log_D + jnp.cumsum(steps, axis=-2)
        log_start = log_start + jnp.cumsum(part, axis=-1)
    visible = jnp.expand_dims(t >= s, (0, 1, 2))
    if gates.reset is not None:
        # Resets are a mask, not a large negative log f: a sum with one would lose its digits.
        segment = jnp.cumsum(gates.reset, axis=-1)
        visible = visible & (segment[..., :, None] == segment[..., None, :])
        log_start = jnp.where(segment == 0, log_start, pre.NEG)
    log_D = jnp.where(visible, log_D, pre.NEG)
    return log_D[:, :, 0], log_start[:, :, 0], m[:, :, 0]
