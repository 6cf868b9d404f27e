"""mLSTM over all pairs of positions at once, with the log-space stabilizer matrix.

Quadratic in T; the implementation to read, and to compare others with. The whole sequence is one
chunk, and autodiff computes the gradients.

Source: arXiv:2405.04517, appendix (parallel mLSTM).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm import gates as pre
from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.cpu import materialize
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.ops.mlstm.chunkwise import query_weights
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
    decays = _decays(gates, state, options)
    # Weights are divided by exp(m): exponents are <= 0, whatever the gates are.
    within, across = query_weights(decays)
    P = scale * exact_einsum("BTHK,BSHK->BHTS", q, k) * within
    start = scale * across
    h = exact_einsum("BHTS,BSHV->BTHV", P, v)
    h = h + exact_einsum("BHT,BTHK,BHKV->BTHV", start, q, state.C)
    if options.normalize:
        d = jnp.sum(P, axis=-1) + start * exact_einsum("BTHK,BHK->BHT", q, state.n)
        norm = jnp.maximum(jnp.abs(d), pre.lower_bound(decays.m)) + options.eps
        h = h / jnp.swapaxes(norm, 1, 2)[..., None]
    # The weights of keys and values in the state after the last position.
    f_scaled = jnp.exp(decays.across)
    keys = jnp.exp(decays.to_end)[..., None] * jnp.swapaxes(k, 1, 2)
    C = f_scaled[..., None, None] * state.C + exact_einsum("BHSK,BSHV->BHKV", keys, v)
    n = f_scaled[..., None] * state.n + jnp.sum(keys, axis=-2)
    return flags.zero_masked(h).astype(x.v.dtype), MLSTMState(C, n, decays.m_end)


def _decays(gates: pre.LogGates, state: MLSTMState, options: Options) -> pre.Decays:
    """Log weights `B H T` of the sequence as one chunk."""
    chunks = pre.in_chunks(gates, gates.log_i.shape[1])
    m = pre.stabilizers(chunks, state.m, max_state=options.max_state)
    decays = pre.decays(chunks, *m, forget_gate=options.forget_gate)
    return jax.tree.map(lambda a: a[:, :, 0], decays)
