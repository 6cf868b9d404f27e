"""Chunkwise mLSTM: parallel within a chunk, recurrent over the states at chunk boundaries.

Chunks of all sequences and heads share one axis Z = N * B * H, chunk index first: XLA's CPU backend
is fast at loops over three axes. On a mesh, each shard has its own. Y is B * H. `u` is the
unnormalized read-out, `d` its normalizer, both divided by exp(m), where m is the log-scale of the
recurrence.

Gradients come from autodiff, in every mode. The log weight of a query and a key is a sum of one
term each, so the weights are constants to autodiff, and queries and keys are multiplied by factors
that are 1 and carry the gradient of the gates (`gradient.unit`): nothing is summed over pairs of
positions.

m is a gauge: moving a factor between exp(m) and (C, n) changes nothing. It is a constant too,
except where a result depends on it: in eps, which is added in the scaled domain, and in the
returned C, n and m.

Source: arXiv:2503.14376 (tiled flash linear attention), section 3; the gradient is our derivation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm.gates import READ_FLOOR, Decays, LogGates
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.cells.time import vary_like
from xlstm_jax.ops.cpu import materialize, materialize_cotangent
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.gradient import times_unit, unit, with_backward
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.ops.mlstm.products import product
from xlstm_jax.typing import Array, Float, Size

CHUNK_SIZE = 64
"""Positions per chunk by default."""

_SAVED = "mlstm"  # name of the results that are saved for the backward pass, besides the inputs


class Chunks(NamedTuple):
    """Queries, keys and values in chunks, in the dtype of the state."""

    q: Float[Array, "Z L K"]
    k: Float[Array, "Z L K"]
    v: Float[Array, "Z L V"]


class LogFactors(NamedTuple):
    """Sums of log gates, by which the weights depend on the gates; see `gradient.unit`."""

    query: Float[Array, "Z L"]
    key: Float[Array, "Z L"]
    end: Float[Array, "Z"]  # of everything in the state after a chunk


class Memory(NamedTuple):
    """A state without its log-scale."""

    C: Float[Array, "*Z K V"]
    n: Float[Array, "*Z K"]

    def times(self, factor: Float[Array, "*Z"]) -> "Memory":
        """Both leaves, scaled."""
        return Memory(factor[..., None, None] * self.C, factor[..., None] * self.n)


def mlstm_chunkwise(
    x: Inputs, state: MLSTMState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """The op `mlstm`, for any T; memory grows with T, not with T * chunk_size."""
    dtype = state.C.dtype
    q, k, v = (flags.zero_masked(a) for a in x[:3])
    gates = pre.log_gates(x.i, x.f, *flags, **options.gates, dtype=dtype)
    if not options.max_state:
        # The states of this op have m = 0; the caller's may have another m.
        state = MLSTMState(*pre.fold_stabilizer(*state))
    # Weights and scores, L x L per chunk, are rematerialized in the backward pass.
    policy = jax.checkpoint_policies.save_only_these_names(_SAVED)
    core = jax.checkpoint(_chunkwise, policy=policy, prevent_cse=False, static_argnums=0)
    h, state = core(options, q, k, v, gates, state)
    # A masked position writes nothing, but its query still reads the state.
    return flags.zero_masked(h), state


def _chunkwise(options: Options, q, k, v, gates: LogGates, state: MLSTMState):
    B, T, H = q.shape[:3]
    # A short sequence is one chunk of its own length, without padding.
    L = min(options.chunk_size or CHUNK_SIZE, T)
    # An operand of products, and possibly a broadcast constant: see `materialize`.
    C, n, m_first = materialize(jax.tree.map(_merge_leading, state))
    gates = _chunk_gates(gates, L)
    m = _stabilizers(gates, m_first) if options.max_state else jnp.zeros_like(gates.log_i)
    m = checkpoint_name(m, _SAVED)
    decays = materialize(_decays(options, gates, m, m_first))
    chunks = Chunks(*(_chunk(a, L).astype(state.C.dtype) for a in (q, k, v)))
    factors, initial = _log_factors(gates), Memory(C, n).times(unit(m_first))
    starts, last = _boundary_states(chunks, factors, decays, initial, v.dtype)
    u, d = _read(chunks, factors, decays, starts, v.dtype)
    h = _normalize(u, d, m, options.eps) if options.normalize else materialize_cotangent(u)
    m_last = m[-m_first.size :, -1]
    last = MLSTMState(*last.times(unit(-m_last)), m_last)
    last = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), last, state)
    return _join(h.astype(v.dtype), B, T, H), last


def _chunk_gates(gates: LogGates, L: int) -> LogGates:
    """Gates `Z L`; the last chunk is padded with steps that write and forget nothing."""
    log_i, log_f = materialize((_chunk(gates.log_i, L, fill=pre.NEG), _chunk(gates.log_f, L)))
    if gates.reset is None:
        return LogGates(log_i, log_f, None)
    reset = jnp.broadcast_to(gates.reset[..., None], gates.log_i.shape)
    return LogGates(log_i, log_f, _chunk(reset, L))


def _log_factors(gates: LogGates) -> LogFactors:
    """Each differs by constants from a logarithm of weights."""
    # Limited, as the difference of infinities would be NaN.
    log_i, log_f = jnp.maximum(gates.log_i, pre.NEG), jnp.maximum(gates.log_f, pre.NEG)
    F = pre.prefix_sum(log_f, gates.reset)
    return LogFactors(F, log_i - F, F[:, -1])


def _forward_stabilizers(gates: LogGates, m_first: Float[Array, "Y"]):
    by_sequence = jax.tree.map(lambda x: x.reshape(-1, m_first.size, x.shape[-1]), gates)
    m, _, _ = pre.stabilizers(by_sequence, m_first, max_state=True, chunk_axis=0)
    m = materialize(_merge_leading(m))
    return m, (gates, m_first, m)


def _backward_stabilizers(residuals, dm: Float[Array, "Z L"]):
    gates, m_first, m = residuals
    through_f, carried = pre.stabilizer_path(gates, m, _before_chunks(m, m_first))
    rho = vary_like(jnp.zeros_like(m_first), dm)
    leaving = pre.end_grads(carried, dm, rho).reshape(-1)
    di, df, before = pre.stabilizer_grads(through_f, carried, leaving, dm)
    return LogGates(di, df, None), before[: m_first.size]


_stabilizers = with_backward(_forward_stabilizers, _backward_stabilizers)
"""(gates, m before the first chunk `Y`) -> m after every position, `Z L`."""


def _before_chunks(m: Float[Array, "Z L"], m_first: Float[Array, "Y"]) -> Float[Array, "Z"]:
    """m before every chunk."""
    return jnp.concatenate([m_first, m[: -m_first.size, -1]])


def _decays(options: Options, gates: LogGates, m: Array, m_first: Array) -> Decays:
    """The log weights, constants to autodiff."""
    gates, m, m_first = jax.lax.stop_gradient((gates, m, m_first))
    m_start = _before_chunks(m, m_first)
    return pre.decays(gates, m, m_start, m[:, -1], forget_gate=options.forget_gate)


def _boundary_states(
    x: Chunks, factors: LogFactors, decays: Decays, initial: Memory, dtype: jnp.dtype
) -> tuple[Memory, Memory]:
    """The states at chunk starts, leading axis Z, and the last; `initial` has the leading axis Y.

    Products take operands in `dtype` and accumulate in that of the state.
    """
    # Increments are computed for all chunks at once; the scan only scales and adds.
    to_end = times_unit(jnp.exp(decays.to_end), factors.key + factors.end[:, None])
    keys = to_end[..., None] * x.k
    new = Memory(product("ZLK,ZLV->ZKV", dtype, keys, x.v), jnp.sum(keys, axis=-2))
    f_scaled = times_unit(jnp.exp(decays.across), factors.end)

    def step(state: Memory, chunk):
        f_scaled, new = chunk
        return Memory(*map(jnp.add, state.times(f_scaled), new)), state

    Y = initial.n.shape[0]
    chunks = jax.tree.map(lambda a: a.reshape((-1, Y) + a.shape[1:]), (f_scaled, new))
    last, starts = jax.lax.scan(step, initial, chunks)
    return checkpoint_name(jax.tree.map(_merge_leading, starts), _SAVED), last


def _read(
    x: Chunks, factors: LogFactors, decays: Decays, starts: Memory, dtype: jnp.dtype
) -> tuple[Float[Array, "Z L V"], Float[Array, "Z L"]]:
    """Unnormalized read-out and normalizer of every position."""
    within, across = _query_weights(decays)
    scale = x.q.shape[-1] ** -0.5
    q, k = times_unit(x.q, factors.query), times_unit(x.k, factors.key)
    P = product("ZLK,ZSK->ZLS", dtype, q, k) * (scale * within)
    q = (scale * across)[..., None] * q
    u = product("ZLS,ZSV->ZLV", dtype, P, x.v) + product("ZLK,ZKV->ZLV", dtype, q, starts.C)
    d = jnp.sum(P, axis=-1) + jnp.sum(q * starts.n[..., None, :], axis=-1)
    return u, checkpoint_name(d, _SAVED)


def _normalize(u: Array, d: Array, m: Array, eps: float) -> Array:
    """u / (max(|d|, exp(-m)) + eps), where eps counts in units of exp(m)."""
    bound = pre.lower_bound(jax.lax.stop_gradient(m))
    return _divide(u, jnp.maximum(jnp.abs(d), bound) + eps * unit(jnp.maximum(m, READ_FLOOR)))


@jax.custom_jvp
def _divide(u: Float[Array, "Z L V"], norm: Float[Array, "Z L"]) -> Float[Array, "Z L V"]:
    return u / norm[..., None]


@_divide.defjvp
def _divide_jvp(primals, tangents):
    (u, norm), (du, dnorm) = primals, tangents
    h = checkpoint_name(_divide(u, norm), _SAVED)
    # In terms of h, so that u is not saved for the backward pass.
    return h, (du - h * dnorm[..., None]) / norm[..., None]


def _query_weights(decays: Decays) -> tuple[Float[Array, "Z L L"], Float[Array, "Z L"]]:
    """For every query: weights of keys, and of the state at the chunk's start, divided by e^m."""
    L, segment = decays.m.shape[-1], decays.segment
    visible = jnp.tril(jnp.ones((L, L), bool))[None]
    if segment is not None:
        visible = visible & (segment[..., :, None] == segment[..., None, :])
    lift = decays.m - jnp.maximum(decays.m, READ_FLOOR)
    # Coarse parts are subtracted first: their difference is exact, see `Decays`.
    coarse = decays.coarse[..., :, None] - decays.coarse[..., None, :]
    query, key = decays.fine + decays.query + lift, decays.key - decays.fine
    source = coarse + (query[..., :, None] + key[..., None, :])
    within = jnp.exp(jnp.where(visible, source, pre.NEG))
    return within, jnp.exp(decays.from_start + lift)


def _chunk(x: Array, L: int, fill: float = 0) -> Array:
    """`B T H ...` to `Z L ...`, with Z = N * B * H; the last chunk is padded with `fill`."""
    B, T, H = x.shape[:3]
    pad = -T % L
    if pad:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    x = x.reshape((B, -1, L, H) + x.shape[3:])
    # The chunk index first, so that a scan over chunks needs a reshape only.
    x = jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))
    return x.reshape((-1, L) + x.shape[4:])


def _join(x: Array, B: Size, T: int, H: int) -> Array:
    """`Z L ...` to `B T H ...`, without the padding of the last chunk."""
    x = x.reshape((-1, B, H) + x.shape[1:])
    x = jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))
    return x.reshape((B, -1, H) + x.shape[4:])[:, :T]


def _merge_leading(x: Array) -> Array:
    """The first two axes as one: `N Y ...` to `Z ...`, or `B H ...` to `Y ...`."""
    return x.reshape((-1,) + x.shape[2:])
