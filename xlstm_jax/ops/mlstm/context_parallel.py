"""The mLSTM with its sequence sharded over devices, which exchange summaries of their shards alone.

What a shard of the sequence does to the state is an affine map, state -> e^g state + e^m C: the
summary (g, m, C, n) says all of it, whatever the length. Each device summarizes its own shard,
receives the summaries of earlier shards, and with the state that they produce computes its shard as
if it were alone. Composition of such maps is associative, so many devices need a logarithmic number
of exchanges. Gradients are those of this program: they cross devices as cotangents of summaries.

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
"""Up to so many shards, summaries are all-gathered; beyond, a logarithm of exchanges is made."""

GATE_CHUNK = 256
"""Positions over which gates are summed at once, before the sums of such chunks are."""


class Summary(NamedTuple):
    """What a shard of the sequence does to the state before it; C and n are divided by e^m."""

    g: Float[Array, "*shards B H"]  # sum of log f; NEG where the shard holds a reset
    m: Float[Array, "*shards B H"]  # log-scale; NEG where the shard writes nothing
    C: Float[Array, "*shards B H K V"]
    n: Float[Array, "*shards B H K"]


def states_around(
    x: Inputs, state: MLSTMState, flags: Flags, options: Options, axes: tuple[str, ...]
) -> tuple[MLSTMState, MLSTMState]:
    """The state before this device's shard of the sequence, and after the last shard.

    Within a `shard_map`; the second is the same on every device.

    Args:
        x: one device's shard.
        state: before the first shard; every device has it.
        axes: mesh axes over which the sequence is sharded, in this order.
    """
    gates = pre.log_gates(x.i, x.f, *flags, input_gate=options.input_gate, dtype=state.C.dtype)
    own = summarize(flags.zero_masked(x.k), flags.zero_masked(x.v), gates, options)
    if not options.max_state:
        state = MLSTMState(*pre.fold_stabilizer(*state))
    few = jax.lax.axis_size(axes) <= ALL_GATHER_SHARDS
    exchange = _all_gather if few else _by_doubling
    return exchange(own, state, axes)


def summarize(
    k: Float[Array, "B T H K"], v: Float[Array, "B T H V"], gates: LogGates, options: Options
) -> Summary:
    """The summary of a shard: one product over all of its positions.

    Gates are summed in chunks, and chunks from the end: what still weighs something there is
    reached over small sums, which keep their digits.
    """
    dtype = gates.log_i.dtype
    weights, g, m = _weights_at_end(gates)
    scale = m if options.max_state else jnp.zeros_like(m)
    keys = jnp.exp(weights - scale[:, None])[..., None] * k
    C = exact_einsum("BTHK,BTHV->BHKV", keys.astype(v.dtype), v, dtype=dtype)
    return Summary(g, scale, C, jnp.sum(keys, axis=1, dtype=dtype))


def _weights_at_end(gates: LogGates):
    """log weight of every position in the state at the end, the shard's g, and its m."""
    B, T, H = gates.log_i.shape
    chunks = pre.in_chunks(gates, min(GATE_CHUNK, T))
    total = materialize(pre.running_sum(chunks))
    decays = pre.log_decays(chunks, total)
    if chunks.reset is None:
        behind, has_reset = decays.across, jnp.zeros(decays.across.shape, bool)
    else:
        has_reset = jnp.any(chunks.reset, axis=-1)
        behind = jnp.where(has_reset, 0.0, decays.across)  # no sum ever sees a minus infinity
    # Of the chunks behind each one: the sum, and the number of those with a reset.
    decay = jnp.flip(jnp.cumsum(jnp.flip(behind, -1), -1), -1)
    resets = jnp.flip(jnp.cumsum(jnp.flip(has_reset, -1), -1), -1)
    after = jnp.where(resets - has_reset > 0, NEG, decay - behind)
    to_end = jnp.maximum(decays.to_end + after[..., None], NEG)
    m = jnp.max(pre.end_max(chunks, total) + after, axis=-1)
    g = jnp.where(resets[..., 0] > 0, NEG, decay[..., 0])
    weights = jnp.moveaxis(to_end.reshape(B, H, -1), 1, 2)[:, :T]
    return weights, g, jnp.maximum(m, NEG)


def combine(x: Summary, y: Summary) -> Summary:
    """The summary of shard x followed by shard y."""
    moved = jnp.maximum(y.g + x.m, NEG)
    m = jnp.maximum(moved, y.m)
    f_scaled, i_scaled = jnp.exp(moved - m), jnp.exp(y.m - m)
    C = f_scaled[..., None, None] * x.C + i_scaled[..., None, None] * y.C
    n = f_scaled[..., None] * x.n + i_scaled[..., None] * y.n
    return Summary(jnp.maximum(x.g + y.g, NEG), m, C, n)


def after(state: MLSTMState, shard: Summary) -> MLSTMState:
    """The state after a shard that starts from `state`."""
    _, m, C, n = combine(Summary(jnp.zeros_like(state.m), state.m, state.C, state.n), shard)
    return MLSTMState(C, n, m)


def _all_gather(own: Summary, state: MLSTMState, axes: tuple[str, ...]):
    """The state before this device's shard and after the last one, from the summaries of all."""
    shards = _unpack(jax.lax.all_gather(_pack(own), axes), own)
    before = _state_before(jax.lax.axis_index(axes), shards, state)
    return before, _state_before(jax.lax.axis_size(axes), shards, state)


def _state_before(rank, shards: Summary, state: MLSTMState) -> MLSTMState:
    """What shards 0 .. rank - 1 make of `state`, each weighed by the decay from it to `rank`."""
    numbers = jnp.arange(len(shards.g))
    seen = numbers < rank
    between = (numbers[:, None] < numbers[None]) & seen[None]
    decay = jnp.sum(jnp.where(between[..., None, None], shards.g[None], 0.0), axis=1)
    written = jnp.where(seen[:, None, None], jnp.maximum(decay + shards.m, NEG), NEG)
    carried = jnp.sum(jnp.where(seen[:, None, None], shards.g, 0.0), axis=0)
    carried = jnp.maximum(carried + state.m, NEG)
    m = jnp.maximum(jnp.max(written, axis=0), carried)
    weights, f_scaled = jnp.exp(written - m[None]), jnp.exp(carried - m)
    # A weight of zero hides whatever a later shard holds.
    weights = jnp.where(seen[:, None, None], weights, 0.0)
    C = exact_einsum("SBH,SBHKV->BHKV", weights, shards.C, dtype=m.dtype)
    n = exact_einsum("SBH,SBHK->BHK", weights, shards.n, dtype=m.dtype)
    return MLSTMState(f_scaled[..., None, None] * state.C + C, f_scaled[..., None] * state.n + n, m)


def _by_doubling(own: Summary, state: MLSTMState, axes: tuple[str, ...]):
    """As `_all_gather`; every exchange doubles the number of shards that a summary covers."""
    count, rank = jax.lax.axis_size(axes), jax.lax.axis_index(axes)

    def receive(x: Summary, distance: int) -> Summary:
        pairs = [(j, j + distance) for j in range(count - distance)]
        sent = _unpack(jax.lax.ppermute(_pack(x), axes, pairs), x)
        identity = jax.tree.map(jnp.zeros_like, x)._replace(m=jnp.full_like(x.m, NEG))
        return jax.tree.map(lambda a, b: jnp.where(rank >= distance, a, b), sent, identity)

    through, distance = own, 1
    while distance < count:
        through = combine(receive(through, distance), through)
        distance *= 2
    first = after(state, receive(through, 1))
    last = jnp.where(rank == count - 1, _pack(through), 0.0)
    return first, after(state, _unpack(jax.lax.psum(last, axes), own))


def _pack(x: Summary) -> Float[Array, "B H numbers"]:
    """As one array, so that one exchange carries all of it."""
    B, H, K, V = x.C.shape
    return jnp.concatenate([x.C.reshape(B, H, K * V), x.n, x.m[..., None], x.g[..., None]], axis=-1)


def _unpack(x: Float[Array, "*shards B H numbers"], like: Summary) -> Summary:
    *_, K, V = like.C.shape
    C, n, m, g = jnp.split(x, (K * V, K * V + K, K * V + K + 1), axis=-1)
    return Summary(g[..., 0], m[..., 0], C.reshape(*x.shape[:-1], K, V), n)
