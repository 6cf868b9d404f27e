"""mLSTM in chunks: parallel inside a chunk, a recurrence over the states at chunk borders.

Chunks of all sequences and heads lie behind each other on one axis Z, position in the sequence
first (Z = N * B * H): loops over three axes are what XLA for CPUs makes fast. On a mesh, each shard
has its own. Y is B * H. `u` is the unnormalized read-out, `d` its normalizer, both divided by
exp(m) with m the log-scale of the recurrence.

The gradient is exact and rematerializes what one chunk needs. The log-scale m of a state is a
gauge: moving a factor between exp(m) and (C, n) changes nothing. So gradients of the gates follow
from scale symmetries (`k_s` appears only as exp(log i_s) k_s, and a state only under the product of
the forget gates since), and m itself matters in two places alone: in eps, which is added in the
scaled domain, and in a loss on the returned C, n and m.

Source: arXiv:2503.14376 (tiled flash linear attention), section 3; the gradient is our derivation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm.gates import READ_FLOOR, LogDecays, LogGates
from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.cpu import materialize
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.typing import Array, Float

CHUNK_SIZE = 64
"""Positions per chunk when none is given."""


class Chunks(NamedTuple):
    """Inputs in chunks."""

    q: Float[Array, "Z L K"]
    k: Float[Array, "Z L K"]
    v: Float[Array, "Z L V"]
    gates: LogGates  # "Z L"


class Rows(NamedTuple):
    """What the backward pass needs of every position besides the inputs."""

    m: Float[Array, "Z L"]  # log-scale of the recurrence after this step
    d: Float[Array, "Z L"]  # signed normalizer
    h: Float[Array, "Z L V"]


class Residuals(NamedTuple):
    """All that the forward pass saves for the backward pass."""

    x: Chunks
    rows: Rows
    starts: MLSTMState  # at the start of every chunk, leading axis Z
    last: MLSTMState  # leading axis Y = B * H


def mlstm_chunkwise(
    x: Inputs, state: MLSTMState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """The op `mlstm`. Any T; memory grows with T, not with T * chunk_size."""
    q, k, v = (flags.zero_masked(a) for a in x[:3])
    gates = pre.log_gates(x.i, x.f, *flags, input_gate=options.input_gate, dtype=state.C.dtype)
    if not options.max_state:
        state = MLSTMState(*pre.fold_stabilizer(*state))
    L = min(options.chunk_size or CHUNK_SIZE, q.shape[1])
    h, state = _chunkwise(options, L, q, k, v, gates, state)  # pyright: ignore[reportGeneralTypeIssues]
    return flags.zero_masked(h), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunkwise(options: Options, L: int, q, k, v, gates: LogGates, state: MLSTMState):
    return _forward(options, L, q, k, v, gates, state)[0]


def _forward(options: Options, L: int, q, k, v, gates: LogGates, state: MLSTMState):
    B, T, H = q.shape[:3]
    # The last chunk is padded with steps that write and forget nothing.
    log_i, log_f = materialize((_chunk(gates.log_i, L, fill=pre.NEG), _chunk(gates.log_f, L)))
    reset = gates.reset
    if reset is not None:
        reset = _chunk(jnp.broadcast_to(reset[..., None], (B, T, H)), L)
    x = Chunks(_chunk(q, L), _chunk(k, L), _chunk(v, L), LogGates(log_i, log_f, reset))
    # A product reads it: see `materialize` on operands that are one value repeated.
    first = materialize(jax.tree.map(_merge_leading, state))
    decays = pre.log_decays(x.gates, materialize(pre.running_sum(x.gates)))
    starts, last = _border_states(options, x, decays, first)
    rows = _outputs(options, x, decays, starts)
    last_by_head = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), last, state)
    return (_join(rows.h, B, T, H), last_by_head), Residuals(x, rows, starts, last)


def _backward(options: Options, L: int, saved: Residuals, cotangents):
    x, rows, starts, last = saved
    dh, dlast_by_head = cotangents
    B, T, H = dh.shape[:3]
    dh, dlast = _chunk(dh, L), materialize(jax.tree.map(_merge_leading, dlast_by_head))
    if not options.normalize:  # else the division by norms makes it more than a constant
        dh = materialize(dh)
    decays = pre.log_decays(x.gates, materialize(pre.running_sum(x.gates)))
    drows = _row_grads(options, rows, dh)
    weights = _row_weights(x.gates, decays, rows.m, starts.m)
    dends, phi, dfirst = _border_grads(saved, decays, drows, weights[1], dlast)
    dq, dk, dv = _input_grads(options, x, decays, starts, drows, weights, dends)
    dlog_i = jnp.sum(x.k * dk, axis=-1)
    flow = jnp.sum(x.q * dq, axis=-1) - dlog_i
    dlog_f = pre.suffix_sum(flow, phi, decays.segment, x.gates.reset)
    if options.max_state:
        rho = dlast.m - _inner(dlast, last)
        through_f, kept = pre.stabilizer_path(x.gates, rows.m, starts.m)
        leaving = _leaving(kept, drows.m, rho)
        gauge_i, gauge_f, gauge_m = pre.stabilizer_grads(through_f, kept, leaving, drows.m)
        dlog_i, dlog_f = dlog_i + gauge_i, dlog_f + gauge_f
        dfirst = dfirst._replace(m=dfirst.m + _by_position(gauge_m, last)[0])
    dq, dk, dv = dq.astype(x.q.dtype), dk.astype(x.k.dtype), dv.astype(x.v.dtype)
    dq, dk, dv, dlog_i, dlog_f = (_join(g, B, T, H) for g in (dq, dk, dv, dlog_i, dlog_f))
    dfirst = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), dfirst, dlast_by_head)
    return dq, dk, dv, LogGates(dlog_i, dlog_f, None), dfirst


_chunkwise.defvjp(_forward, _backward)


def _border_states(options: Options, x: Chunks, decays: LogDecays, state: MLSTMState):
    """The states at chunk starts, leading axis Z, and the last; `state` has the leading axis Y."""
    # Increments are computed for all chunks at once, each in its own scale; the scan only adds.
    own = pre.end_max(x.gates, decays[:2]) if options.max_state else jnp.zeros_like(decays.across)
    weight = jnp.exp(decays.to_end - own[..., None])[..., None]
    keys = weight * x.k
    C_new = exact_einsum("ZLK,ZLV->ZKV", keys.astype(x.v.dtype), x.v, dtype=state.C.dtype)
    n_new = jnp.sum(keys, axis=-2)
    news = tuple(_by_position(a, state) for a in (decays.across, own, C_new, n_new))

    def step(state, chunk):
        across, own, C_new, n_new = chunk
        m = jnp.maximum(across + state.m, own) if options.max_state else state.m
        f_scaled, i_scaled = jnp.exp(across + state.m - m), jnp.exp(own - m)
        C = f_scaled[..., None, None] * state.C + i_scaled[..., None, None] * C_new
        n = f_scaled[..., None] * state.n + i_scaled[..., None] * n_new
        return MLSTMState(C, n, m), state

    last, starts = jax.lax.scan(step, state, news)
    return jax.tree.map(_merge_leading, starts), last


def _outputs(options: Options, x: Chunks, decays: LogDecays, starts: MLSTMState) -> Rows:
    dtype, scale = starts.C.dtype, x.q.shape[-1] ** -0.5
    m = jnp.zeros_like(x.gates.log_i)
    if options.max_state:  # as the step recurrence has it
        source = _source_decay(decays, pre.log_i_for_m(x.gates))
        m = jnp.maximum(jnp.max(source, axis=-1), decays.from_start + starts.m[..., None])
    inside, across = _row_weights(x.gates, decays, m, starts.m)
    P = scale * exact_einsum("ZLK,ZSK->ZLS", x.q, x.k, dtype=dtype) * inside
    q = (scale * across)[..., None] * x.q
    u = exact_einsum("ZLS,ZSV->ZLV", P.astype(x.v.dtype), x.v, dtype=dtype)
    C = starts.C.astype(x.v.dtype)
    u = u + exact_einsum("ZLK,ZKV->ZLV", q.astype(x.v.dtype), C, dtype=dtype)
    if not options.normalize:
        return Rows(m, jnp.zeros_like(m), u.astype(x.v.dtype))
    d = jnp.sum(P, axis=-1) + jnp.sum(q * starts.n[..., None, :], axis=-1)
    norm, _ = _row_norm(options, m, d)
    return Rows(m, d, (u / norm[..., None]).astype(x.v.dtype))


class _RowGrads(NamedTuple):
    """Cotangents of a row's read-out `u`, of its normalizer `d`, and of its log-scale `m`."""

    u: Float[Array, "Z L V"]
    d: Float[Array, "Z L"]
    m: Float[Array, "Z L"]


def _row_grads(options: Options, rows: Rows, dh: Float[Array, "Z L V"]) -> _RowGrads:
    dtype = rows.m.dtype
    dh = dh.astype(dtype)
    if not options.normalize:
        return _RowGrads(dh, jnp.zeros_like(rows.d), jnp.zeros_like(rows.m))
    norm, by_d = _row_norm(options, rows.m, rows.d)
    dnorm = -jnp.sum(dh * rows.h.astype(dtype), axis=-1) / norm
    # eps is added in the scaled domain: in units of the state it is eps * exp(m).
    dm = jnp.where(rows.m >= READ_FLOOR, options.eps * dnorm, 0)
    return _RowGrads(dh / norm[..., None], jnp.where(by_d, jnp.sign(rows.d) * dnorm, 0), dm)


def _border_grads(saved: Residuals, decays: LogDecays, drows: _RowGrads, across, dlast):
    """Cotangents of the states leaving each chunk, what scaling them costs, and of the first."""
    x, _, starts, last = saved
    dtype = starts.C.dtype
    q_across = (x.q.shape[-1] ** -0.5 * across)[..., None] * x.q
    read = exact_einsum("ZLK,ZLV->ZKV", q_across.astype(x.v.dtype), _as(drows.u, x.v), dtype=dtype)
    read_n = jnp.sum(q_across * drows.d[..., None], axis=-2)
    m_end = jnp.concatenate([starts.m[last.m.size :], last.m])
    f_scaled = jnp.exp(decays.across + starts.m - m_end)

    def step(carry, chunk):
        dC, dn, phi = carry
        f_scaled, read, read_n, C, n = chunk
        dC_start = f_scaled[..., None, None] * dC + read
        dn_start = f_scaled[..., None] * dn + read_n
        phi_start = jnp.sum(dC_start * C, axis=(-2, -1)) + jnp.sum(dn_start * n, axis=-1)
        return (dC_start, dn_start, phi_start), carry

    first = (dlast.C, dlast.n, _inner(dlast, last))
    xs = tuple(_by_position(a, last) for a in (f_scaled, read, read_n, starts.C, starts.n))
    (dC, dn, dm), (dC_end, dn_end, phi) = jax.lax.scan(step, first, xs, reverse=True)
    dC_end, dn_end, phi = (_merge_leading(a) for a in (dC_end, dn_end, phi))
    return (dC_end, dn_end, m_end), phi, MLSTMState(dC, dn, dm)


def _input_grads(options, x: Chunks, decays: LogDecays, starts, drows: _RowGrads, weights, dends):
    dtype, scale = starts.C.dtype, x.q.shape[-1] ** -0.5
    (inside, across), (dC_end, dn_end, m_end) = weights, dends
    C, dC_end = _as(starts.C, x.v), _as(dC_end, x.v)
    du = _as(drows.u, x.v)
    to_end = jnp.exp(decays.to_end - m_end[..., None])
    inside = scale * inside
    dS = (exact_einsum("ZLV,ZSV->ZLS", du, x.v, dtype=dtype) + drows.d[..., None]) * inside
    P = exact_einsum("ZLK,ZSK->ZLS", x.q, x.k, dtype=dtype) * inside
    dS, P = _as(dS, x.v), _as(P, x.v)
    read = exact_einsum("ZLV,ZKV->ZLK", du, C, dtype=dtype)
    if options.normalize:
        read = read + drows.d[..., None] * starts.n[..., None, :]
    dq = exact_einsum("ZLS,ZSK->ZLK", dS, x.k, dtype=dtype) + (scale * across)[..., None] * read
    written = exact_einsum("ZSV,ZKV->ZSK", x.v, dC_end, dtype=dtype) + dn_end[..., None, :]
    dk = exact_einsum("ZLS,ZLK->ZSK", dS, x.q, dtype=dtype) + to_end[..., None] * written
    keys = _as(to_end[..., None] * x.k, x.v)
    dv = exact_einsum("ZLS,ZLV->ZSV", P, du, dtype=dtype)
    dv = dv + exact_einsum("ZSK,ZKV->ZSV", keys, dC_end, dtype=dtype)
    return dq, dk, dv


def _leaving(kept, dm: Float[Array, "Z L"], rho: Float[Array, "Y"]) -> Float[Array, "Z"]:
    """Cotangent of m after each chunk from later chunks; `rho` is that of the last m."""
    entering = jnp.sum(jnp.where(jnp.cumsum(~kept, axis=-1) == 0, dm, 0), axis=-1)

    def step(leaving, chunk):
        all_kept, entering = chunk
        return entering + jnp.where(all_kept, leaving, 0), leaving

    chunks = (a.reshape(-1, rho.size) for a in (jnp.all(kept, axis=-1), entering))
    return jax.lax.scan(step, rho, tuple(chunks), reverse=True)[1].reshape(-1)


def _inner(cotangent: MLSTMState, state: MLSTMState) -> Float[Array, "Y"]:
    """What scaling the whole state costs."""
    C = jnp.sum(cotangent.C * state.C, axis=(-2, -1))
    return C + jnp.sum(cotangent.n * state.n, axis=-1)


def _source_decay(decays: LogDecays, log_i: Float[Array, "Z L"]) -> Float[Array, "Z L L"]:
    """log weight of source s (last axis) in row t; NEG where s > t or a reset lies between."""
    L, (coarse, fine, segment, *_) = log_i.shape[-1], decays
    seen = jnp.tril(jnp.ones((L, L), bool))[None]
    if segment is not None:
        seen = seen & (segment[..., :, None] == segment[..., None, :])
    coarse = coarse[..., :, None] - coarse[..., None, :]
    fine = fine[..., :, None] + (log_i - fine)[..., None, :]
    return jnp.where(seen, coarse + fine, pre.NEG)


def _row_weights(
    gates: LogGates, decays: LogDecays, m: Float[Array, "Z L"], m_start: Float[Array, "Z"]
) -> tuple[Float[Array, "Z L L"], Float[Array, "Z L"]]:
    """Factors of sources and of the state at the chunk's start, over e^m."""
    m = jnp.maximum(m, READ_FLOOR)
    source = _source_decay(decays, gates.log_i)
    across = decays.from_start + m_start[..., None]
    return jnp.exp(source - m[..., None]), jnp.exp(across - m)


def _row_norm(options: Options, m: Float[Array, "Z L"], d: Float[Array, "Z L"]):
    """The divisor of every position, and whether it is |d| (else a bound: no gradient to d)."""
    bound = pre.lower_bound(m)
    return jnp.maximum(jnp.abs(d), bound) + options.eps, jnp.abs(d) > bound


def _chunk(x: Array, L: int, fill: float = 0) -> Array:
    """`B T H ...` to `Z L ...`, with Z = N * B * H."""
    B, T, H = x.shape[:3]
    pad = -T % L
    if pad:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    x = x.reshape((B, -1, L, H) + x.shape[3:])
    x = jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))
    return x.reshape((-1, L) + x.shape[4:])


def _join(x: Array, B: int, T: int, H: int) -> Array:
    """`Z L ...` to `B T H ...`, without the padding of the last chunk."""
    x = x.reshape((-1, B, H) + x.shape[1:])
    x = jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))
    return x.reshape((B, -1, H) + x.shape[4:])[:, :T]


def _by_position(x: Array, state: MLSTMState) -> Array:
    """`Z ...` to `N Y ...`: chunks of a sequence, and sequences with their heads."""
    return x.reshape((-1,) + state.m.shape + x.shape[1:])


def _merge_leading(x: Float[Array, "N Y ..."]) -> Float[Array, "Z ..."]:
    """The first two axes as one: the reverse of `_by_position`, or `B H ...` to `Y ...`."""
    return x.reshape((-1,) + x.shape[2:])


def _as(x: Array, like: Array) -> Array:
    return x.astype(like.dtype)
