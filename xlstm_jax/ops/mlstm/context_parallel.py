"""Context parallelism of the mLSTM: the sequence is sharded, devices exchange shard summaries.

A shard of the sequence acts on the state as an affine map, state -> e^g state + e^m C. The summary
(g, m, C, n) describes it completely, whatever the length. Each device summarizes its shard,
receives the summaries of earlier shards, computes the state before its shard from them, and runs
the op on its shard. Composition of affine maps is associative, so many devices need a logarithmic
number of exchanges. Gradients come from autodiff: devices exchange cotangents of summaries.

Source: the recurrence of arXiv:2405.04517, section 2.3, written for shards instead of steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm.gates import NEG, LogGates
from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.cpu import materialize
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.typing import Array, Float

ALL_GATHER_SHARDS = 16
"""Up to this many shards, summaries are all-gathered; beyond, exchanged by recursive doubling."""

GATE_CHUNK = 256
"""Positions per chunk in the two-level sum of log gates: within chunks, then over chunks."""


class Summary(NamedTuple):
    """The affine map of a shard of the sequence on the state; C and n are divided by e^m."""

    g: Float[Array, "*shards B H"]  # sum of log f; NEG if the shard contains a reset
    m: Float[Array, "*shards B H"]  # log-scale; NEG if the shard writes nothing
    C: Float[Array, "*shards B H K V"]
    n: Float[Array, "*shards B H K"]


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
    zero = jnp.zeros_like(state.m)
    summary = summary._replace(m=jnp.zeros_like(summary.m))
    before, after = exchange(summary, state._replace(m=zero), axes)
    return before._replace(m=before.m + first), after._replace(m=after.m + last)


def _boundary_stabilizers(gates: LogGates, m: Float[Array, "B H"], options: Options, axes):
    """m of the recurrence before this shard, and after the last one; `m` is before the first."""
    _, g, m_shard = _weights_at_end(gates, options)
    # `B H 1 shards`: shards take the place of steps.
    shards = (jnp.moveaxis(jax.lax.all_gather(a, axes), 0, -1)[:, :, None] for a in (m_shard, g))
    m_shard, g = shards
    steps = pre.stabilizers(LogGates(m_shard, g, None), m, max_state=True)[0][:, :, 0]
    starts = jnp.concatenate([m[..., None], steps], axis=-1)
    return jnp.take(starts, jax.lax.axis_index(axes), axis=-1), starts[..., -1]


def summarize(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gates: LogGates,
    options: Options,
    m_first: Float[Array, "B H"] | None = None,
) -> Summary:
    """The summary of a shard: one matrix product over all its positions.

    With `m_first`, m before the shard, the result is relative: g is the log weight of the state
    before the shard in the state after it, both divided by e^m.
    """
    dtype = gates.log_i.dtype
    weights, g, m = _weights_at_end(gates, options, m_first)
    keys = jnp.exp(weights)[..., None] * k
    C = exact_einsum("BTHK,BTHV->BHKV", keys.astype(v.dtype), v, dtype=dtype)
    return Summary(g, m, C, jnp.sum(keys, axis=1, dtype=dtype))


def _weights_at_end(gates: LogGates, options: Options, m_first=None):
    """log weight of every position in the state at the shard's end, and the shard's g and m.

    Relative to m they are sums of negative numbers over later steps: within a chunk, then over
    chunks.
    """
    B, T, H = gates.log_i.shape
    chunks = pre.in_chunks(gates, min(GATE_CHUNK, T))
    first = jnp.full((B, H), NEG, gates.log_i.dtype) if m_first is None else m_first
    m = materialize(pre.stabilizers(chunks, first, max_state=options.max_state))
    decays = pre.decays(chunks, *m, forget_gate=options.forget_gate)
    later = jax.lax.cumsum(decays.across, axis=2, reverse=True)
    later = jnp.pad(later[..., 1:], ((0, 0), (0, 0), (0, 1)))
    # NEG is the lowest log weight, also where a sum has more than one of them.
    to_end = jnp.maximum(decays.to_end + later[..., None], NEG)
    weights = jnp.moveaxis(to_end.reshape(B, H, -1), 1, 2)[:, :T]
    if m_first is not None:
        return weights, jnp.sum(decays.across, axis=-1), decays.m_end[..., -1]
    log_f = gates.log_f
    if gates.reset is not None:
        log_f = jnp.where(gates.reset[..., None], -jnp.inf, log_f)
    return weights, jnp.sum(log_f, axis=1), decays.m_end[..., -1]


def combine(x: Summary, y: Summary) -> Summary:
    """The summary of shard x followed by shard y."""
    log_carry = jnp.maximum(y.g + x.m, NEG)
    m = jnp.maximum(log_carry, y.m)
    f_scaled, i_scaled = jnp.exp(log_carry - m), jnp.exp(y.m - m)
    C = f_scaled[..., None, None] * x.C + i_scaled[..., None, None] * y.C
    n = f_scaled[..., None] * x.n + i_scaled[..., None] * y.n
    return Summary(x.g + y.g, m, C, n)


def apply_summary(state: MLSTMState, shard: Summary) -> MLSTMState:
    """The state after a shard that starts from `state`."""
    # The state as a summary: its g does not enter m, C and n of the result.
    _, m, C, n = combine(Summary(jnp.zeros_like(state.m), state.m, state.C, state.n), shard)
    return MLSTMState(C, n, m)


def _all_gather(summary: Summary, state: MLSTMState, axes: tuple[str, ...]):
    """The state before this device's shard and after the last, from all-gathered summaries."""
    shards = _unpack(jax.lax.all_gather(_pack(summary), axes), summary)
    before = _state_before(jax.lax.axis_index(axes), shards, state)
    return before, _state_before(jax.lax.axis_size(axes), shards, state)


def _state_before(rank, shards: Summary, state: MLSTMState) -> MLSTMState:
    """The state after shards 0 .. rank - 1 that start from `state`.

    Each summary is weighted by the decay from its shard to shard `rank`.
    """
    ranks = jnp.arange(len(shards.g))
    is_before = ranks < rank
    is_between = (ranks[:, None] < ranks[None]) & is_before[None]
    decay = jnp.sum(jnp.where(is_between[..., None, None], shards.g[None], 0.0), axis=1)
    log_weights = jnp.where(is_before[:, None, None], jnp.maximum(decay + shards.m, NEG), NEG)
    log_carry = jnp.sum(jnp.where(is_before[:, None, None], shards.g, 0.0), axis=0)
    log_carry = jnp.maximum(log_carry + state.m, NEG)
    m = jnp.maximum(jnp.max(log_weights, axis=0), log_carry)
    weights, f_scaled = jnp.exp(log_weights - m[None]), jnp.exp(log_carry - m)
    # If m is NEG, exp(NEG - m) is 1: later shards need an explicit zero.
    weights = jnp.where(is_before[:, None, None], weights, 0.0)
    C = exact_einsum("SBH,SBHKV->BHKV", weights, shards.C, dtype=m.dtype)
    n = exact_einsum("SBH,SBHK->BHK", weights, shards.n, dtype=m.dtype)
    return MLSTMState(f_scaled[..., None, None] * state.C + C, f_scaled[..., None] * state.n + n, m)


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
