"""Context parallelism of the mLSTM: the sequence is sharded, devices exchange shard summaries.

Each device summarizes its shard (`summaries`), receives the summaries of earlier shards, computes
the state before its shard from them, and runs the op on its shard. Many devices need a logarithmic
number of exchanges. Gradients come from autodiff: devices exchange cotangents of summaries.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm.gates import NEG, LogGates
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.ops.mlstm.summaries import (
    Summary,
    absolute,
    apply_summary,
    boundary_stabilizers,
    combine,
    relative,
    state_before,
    summarize,
    weights_at_end,
)
from xlstm_jax.typing import Array, Float

ALL_GATHER_SHARDS = 16
"""Up to this many shards, summaries are all-gathered; beyond, exchanged by recursive doubling."""


def boundary_states(
    x: Inputs, state: MLSTMState, flags: Flags, options: Options, axes: tuple[str, ...]
) -> tuple[MLSTMState, MLSTMState]:
    """The state before this device's shard of the sequence, and after the last shard.

    Call within a `shard_map`; the second state is the same on every device.

    Args:
        x: one device's shard.
        state: before the first shard; replicated.
        axes: mesh axes over which the sequence is sharded, in this order.
    """
    gates = pre.log_gates(x.i, x.f, *flags, **options.gates, dtype=state.C.dtype)
    if not options.max_state:
        state = MLSTMState(*pre.fold_stabilizer(*state))
    # All-gather is one collective, but its size and work grow with the number of shards.
    is_small = jax.lax.axis_size(axes) <= ALL_GATHER_SHARDS
    exchange = _all_gather if is_small else _by_doubling
    k, v = flags.zero_masked(x.k), flags.zero_masked(x.v)
    if options.forget_gate == "sigmoid":
        return exchange(summarize(k, v, gates, options), state, axes)
    # Sums of log f far above 0 would round log weights, so all are relative to m of the recurrence,
    # which needs an earlier exchange of two numbers per head.
    first, last = _boundary_stabilizers(gates, state.m, options, axes)
    summary = summarize(k, v, gates, options, first)
    summary = summary._replace(m=jnp.zeros_like(summary.m))
    before, after = exchange(summary, relative(state), axes)
    return absolute(before, first), absolute(after, last)


def _boundary_stabilizers(gates: LogGates, m: Float[Array, "B H"], options: Options, axes):
    """m of the recurrence before this shard, and after the last one; `m` is before the first."""
    _, g, m_shard = weights_at_end(gates, options)
    m_shards, g_shards = (jax.lax.all_gather(a, axes) for a in (m_shard, g))
    starts = boundary_stabilizers(m_shards, g_shards, m)
    return jnp.take(starts, jax.lax.axis_index(axes), axis=0), starts[-1]


def _all_gather(summary: Summary, state: MLSTMState, axes: tuple[str, ...]):
    """The state before this device's shard and after the last, from all-gathered summaries."""
    shards = _unpack(jax.lax.all_gather(_pack(summary), axes), summary)
    before = state_before(jax.lax.axis_index(axes), shards, state)
    return before, state_before(jax.lax.axis_size(axes), shards, state)


def _by_doubling(summary: Summary, state: MLSTMState, axes: tuple[str, ...]):
    """As `_all_gather`, by a prefix scan: each exchange doubles the shards a summary covers."""
    count, rank = jax.lax.axis_size(axes), jax.lax.axis_index(axes)

    def receive(x: Summary, distance: int) -> Summary:
        pairs = [(j, j + distance) for j in range(count - distance)]
        received = _unpack(jax.lax.ppermute(_pack(x), axes, pairs), x)
        # Devices without a sender receive zeros, but the identity map has m = NEG.
        identity = jax.tree.map(jnp.zeros_like, x)._replace(m=jnp.full_like(x.m, NEG))
        return jax.tree.map(lambda a, b: jnp.where(rank >= distance, a, b), received, identity)

    prefix, distance = summary, 1
    while distance < count:
        prefix = combine(receive(prefix, distance), prefix)
        distance *= 2
    initial = apply_summary(state, receive(prefix, 1))
    # The last device has the summary of all shards; zeros elsewhere make the psum a broadcast.
    last = jnp.where(rank == count - 1, _pack(prefix), 0.0)
    return initial, apply_summary(state, _unpack(jax.lax.psum(last, axes), summary))


def _pack(x: Summary) -> Float[Array, "B H packed"]:
    """The summary as one array, so that one collective sends all leaves."""
    B, H, K, V = x.C.shape
    return jnp.concatenate([x.C.reshape(B, H, K * V), x.n, x.m[..., None], x.g[..., None]], axis=-1)


def _unpack(x: Float[Array, "*shards B H packed"], like: Summary) -> Summary:
    *_, K, V = like.C.shape
    C, n, m, g = jnp.split(x, (K * V, K * V + K, K * V + K + 1), axis=-1)
    return Summary(g[..., 0], m[..., 0], C.reshape(*x.shape[:-1], K, V), n)
