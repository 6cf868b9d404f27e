"""The mLSTM with its sequence cut over devices, which exchange summaries of their spans alone.

What a span of time does to the memory is an affine map, memory -> e^g memory + e^m C: the summary
(g, m, C, n) says all of it, whatever the length of the span. Each device makes that of its own
span, learns those of the spans before it, and with the memory that they leave computes its span as
if it were alone. Composition of such maps is associative, so many devices find what stands before
them in a logarithmic number of exchanges. Gradients are those of this program: they cross devices
as cotangents of summaries.

Source: the recurrence of arXiv:2405.04517, section 2.3, written for spans instead of steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import NEG
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.mlstm_chunkwise import without_scale
from xlstm_jax.ops.mlstm_forward import product
from xlstm_jax.ops.mlstm_gates import ChunkGates, LogGates, chunk_decays, log_gates
from xlstm_jax.typing import Array, Bool, Float

GATHERED_SPANS = 16
"""Up to so many spans every device is sent all summaries; beyond, a logarithm of their number."""

GATE_CHUNK = 256
"""Positions over which gates are added up at once, before the sums of such chunks are."""


class Summary(NamedTuple):
    """What a span does to the memory before it; C and n are divided by e^m."""

    g: Float[Array, "*spans B H"]  # sum of log f; NEG where a reset lies in the span
    m: Float[Array, "*spans B H"]  # log-scale; NEG where the span writes nothing
    C: Float[Array, "*spans B H K V"]
    n: Float[Array, "*spans B H K"]


def mlstm_context(
    compute: Callable[..., tuple[Array, MLSTMState]],
    axes: tuple[str, ...],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    i: Float[Array, "B T H"],
    f: Float[Array, "B T H"],
    state: MLSTMState,
    reset: Bool[Array, "B T"] | None,
    mask: Bool[Array, "B T"] | None,
    *,
    input_gate: str,
    gathered_spans: int = GATHERED_SPANS,
    **options: Any,
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """The op `mlstm` of one device's span, within a `shard_map` over `axes`.

    Args:
        compute: an implementation of the op.
        axes: of the mesh, that cut time; spans follow each other along them.
        state: the memory before the first span; every device has it.
        gathered_spans: see `GATHERED_SPANS`.
        options: for `compute`.

    Returns h of the span, and the memory after the last span, the same on every device.
    """
    gates = log_gates(i, f, reset, mask, input_gate=input_gate, dtype=state.C.dtype)
    if mask is not None:
        # What a masked step holds, be it NaN, is not looked at.
        k, v = (jnp.where(mask[..., None, None], x, 0) for x in (k, v))
    own = span_summary(k, v, gates, exponential=input_gate == "exp")
    count = jax.lax.axis_size(axes)
    memory = state if input_gate == "exp" else without_scale(state)
    if count <= gathered_spans:
        first, last = _from_all(own, memory, axes)
    else:
        first, last = _from_a_logarithm(own, memory, axes)
    h, _ = compute(q, k, v, i, f, first, reset=reset, mask=mask, input_gate=input_gate, **options)
    return h, last


def span_summary(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gates: LogGates,
    *,
    exponential: bool,
) -> Summary:
    """The summary of a whole span: one product over all of its positions.

    Gates are added up in chunks, and chunks from the end: what still weighs something there is
    reached over small sums, which keep their digits.
    """
    dtype = gates.log_i.dtype
    weights, g, m = _weights_at_end(gates)
    scale = m if exponential else jnp.zeros_like(m)
    keys = jnp.exp(weights - scale[:, None])[..., None] * k
    C = product("BTHK,BTHV->BHKV", keys.astype(v.dtype), v, dtype)
    return Summary(g, scale, C, jnp.sum(keys, axis=1, dtype=dtype))


def _weights_at_end(gates: LogGates):
    """log weight of every position in the memory at the end, the span's g, and its m."""
    B, T, H = gates.log_i.shape
    L = min(GATE_CHUNK, T)
    log_i, log_f = (_chunks(x, L, fill) for x, fill in ((gates.log_i, NEG), (gates.log_f, 0.0)))
    reset = gates.reset
    if reset is not None:
        reset = _chunks(jnp.broadcast_to(reset[..., None], (B, T, H)), L, False)
    decays = chunk_decays(ChunkGates(log_i, log_f, reset))
    across = decays.across.reshape(B, H, -1)
    if reset is None:
        behind, cut = across, jnp.zeros(across.shape, bool)
    else:
        cut = jnp.any(reset, axis=-1).reshape(across.shape)
        behind = jnp.where(cut, 0.0, across)  # no sum ever sees a minus infinity
    # Of the chunks behind each one: the sum, and whether memory is emptied in any of them.
    total = jnp.flip(jnp.cumsum(jnp.flip(behind, -1), -1), -1)
    dead = jnp.flip(jnp.cumsum(jnp.flip(cut, -1), -1), -1)
    after = jnp.where(dead - cut > 0, NEG, total - behind)
    to_end = decays.to_end.reshape(*across.shape, L) + after[..., None]
    m = jnp.max(decays.end_max.reshape(across.shape) + after, axis=-1)
    g = jnp.where(dead[..., 0] > 0, NEG, total[..., 0])
    weights = jnp.moveaxis(jnp.maximum(to_end, NEG).reshape(B, H, -1), 1, 2)[:, :T]
    return weights, g, jnp.maximum(m, NEG)


def _chunks(x: Array, L: int, fill: float | bool) -> Array:
    """`B T H` to `B*H*N L`."""
    B, T, H = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % L), (0, 0)), constant_values=fill)
    return jnp.moveaxis(x, 2, 1).reshape(-1, L)


def combine(x: Summary, y: Summary) -> Summary:
    """The summary of span x followed by span y."""
    moved = jnp.maximum(y.g + x.m, NEG)
    m = jnp.maximum(moved, y.m)
    kept, added = jnp.exp(moved - m), jnp.exp(y.m - m)
    C = kept[..., None, None] * x.C + added[..., None, None] * y.C
    n = kept[..., None] * x.n + added[..., None] * y.n
    return Summary(jnp.maximum(x.g + y.g, NEG), m, C, n)


def after(state: MLSTMState, span: Summary) -> MLSTMState:
    """The memory after a span that begins with `state`."""
    start = Summary(jnp.zeros_like(state.m), state.m, state.C, state.n)
    _, m, C, n = combine(start, span)
    return MLSTMState(C, n, m)


def _from_all(own: Summary, state: MLSTMState, axes: tuple[str, ...]):
    """The memory before this device's span and after the last one, from the summaries of all."""
    spans = _unpacked(jax.lax.all_gather(_packed(own), axes), own)
    numbers = jnp.arange(jax.lax.axis_size(axes))
    before = [
        _memory_before(rank, numbers, spans, state)
        for rank in (jax.lax.axis_index(axes), numbers.size)
    ]
    return before[0], before[1]


def _memory_before(rank, numbers: Array, spans: Summary, state: MLSTMState) -> MLSTMState:
    """What spans 0 .. rank - 1 make of `state`: each weighed by what lies between it and `rank`."""
    seen = numbers < rank
    between = (numbers[:, None] < numbers[None]) & seen[None]
    decay = jnp.sum(jnp.where(between[..., None, None], spans.g[None], 0.0), axis=1)
    written = jnp.where(seen[:, None, None], jnp.maximum(decay + spans.m, NEG), NEG)
    kept = jnp.sum(jnp.where(seen[:, None, None], spans.g, 0.0), axis=0)
    kept = jnp.maximum(kept + state.m, NEG)
    m = jnp.maximum(jnp.max(written, axis=0), kept)
    weights, old = jnp.exp(written - m[None]), jnp.exp(kept - m)
    # A weight of zero hides whatever a later span holds.
    weights = jnp.where(seen[:, None, None], weights, 0.0)
    C = old[..., None, None] * state.C + product("SBH,SBHKV->BHKV", weights, spans.C, m.dtype)
    n = old[..., None] * state.n + product("SBH,SBHK->BHK", weights, spans.n, m.dtype)
    return MLSTMState(C, n, m)


def _from_a_logarithm(own: Summary, state: MLSTMState, axes: tuple[str, ...]):
    """As `_from_all`; every exchange doubles the number of spans that are behind a summary."""
    count, rank = jax.lax.axis_size(axes), jax.lax.axis_index(axes)

    def from_before(x: Summary, distance: int) -> Summary:
        sent = jax.lax.ppermute(
            _packed(x), axes, [(j, j + distance) for j in range(count - distance)]
        )
        nothing = _nothing(x)
        return jax.tree.map(
            lambda a, b: jnp.where(rank >= distance, a, b), _unpacked(sent, x), nothing
        )

    through, distance = own, 1
    while distance < count:
        through = combine(from_before(through, distance), through)
        distance *= 2
    first = after(state, from_before(through, 1))
    last = jnp.where(rank == count - 1, _packed(through), 0.0)
    return first, after(state, _unpacked(jax.lax.psum(last, axes), own))


def _nothing(like: Summary) -> Summary:
    """The summary of a span without any step."""
    return Summary(
        jnp.zeros_like(like.g),
        jnp.full_like(like.m, NEG),
        jnp.zeros_like(like.C),
        jnp.zeros_like(like.n),
    )


def _packed(x: Summary) -> Float[Array, "B H numbers"]:
    """As one array, so that one exchange carries all of it."""
    B, H, K, V = x.C.shape
    return jnp.concatenate([x.C.reshape(B, H, K * V), x.n, x.m[..., None], x.g[..., None]], axis=-1)


def _unpacked(x: Float[Array, "*spans B H numbers"], like: Summary) -> Summary:
    *_, K, V = like.C.shape
    C, n, m, g = jnp.split(x, (K * V, K * V + K, K * V + K + 1), axis=-1)
    return Summary(g[..., 0], m[..., 0], C.reshape(*x.shape[:-1], K, V), n)
