"""Chunkwise mLSTM, backward: the exact gradient, recomputing what one chunk needs.

The log-scale m of a memory is a gauge: moving a factor between exp(m) and (C, n) changes nothing.
So gradients of the gates follow from scale symmetries (`k_s` appears only as exp(log i_s) k_s, and
a state only under the product of the forget gates since), and m itself matters in two places alone:
in eps, which is added in the scaled domain, and in a loss placed on the returned C, n and m.

Source of the forward pass: arXiv:2503.14376, section 3; the derivation of the gradient is ours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.mlstm import READ_FLOOR, MLSTMState
from xlstm_jax.ops.mlstm_forward import (
    Chunks,
    Options,
    Rows,
    by_position,
    in_one_row,
    product,
    row_norm,
    row_weights,
)
from xlstm_jax.ops.mlstm_gates import ChunkGates, Decays, chunk_decays
from xlstm_jax.typing import Array, Float, Int


class ChunkGrads(NamedTuple):
    """Cotangents of the inputs; those of the gates are of their logarithms."""

    q: Float[Array, "Z L K"]
    k: Float[Array, "Z L K"]
    v: Float[Array, "Z L V"]
    log_i: Float[Array, "Z L"]
    log_f: Float[Array, "Z L"]


class _RowGrads(NamedTuple):
    """Cotangents of a row's read-out `u`, of its normaliser `d`, and of its log-scale `m`."""

    u: Float[Array, "Z L V"]
    d: Float[Array, "Z L"]
    m: Float[Array, "Z L"]


def chunkwise_backward(
    options: Options,
    x: Chunks,
    rows: Rows,
    starts: MLSTMState,
    last: MLSTMState,
    dh: Float[Array, "Z L V"],
    dlast: MLSTMState,
) -> tuple[ChunkGrads, MLSTMState]:
    """Cotangents of the inputs and of the state before the first step."""
    decays = chunk_decays(x.gates)
    drows = _row_grads(options, rows, dh)
    inside, across = row_weights(x.gates, decays, rows.m, starts.m)
    q_across = (x.q.shape[-1] ** -0.5 * across)[..., None] * x.q
    dends, phi, dfirst = _border_grads(x, decays, drows, q_across, starts, last, dlast)
    dq, dk, dv = _input_grads(options, x, decays, starts, drows, inside, across, dends)
    dlog_i = jnp.sum(x.k * dk, axis=-1)
    flow = jnp.sum(x.q * dq, axis=-1) - dlog_i
    dlog_f = _suffix_sum(flow, decays.segment, phi)
    if x.gates.reset is not None:
        dlog_f = jnp.where(x.gates.reset, 0, dlog_f)
    if options.max_state:
        rho = dlast.m - _inner(dlast, last)
        gauge_i, gauge_f, gauge_m = _scale_grads(x.gates, rows.m, starts.m, drows.m, rho)
        dlog_i, dlog_f = dlog_i + gauge_i, dlog_f + gauge_f
        dfirst = dfirst._replace(m=dfirst.m + gauge_m)
    dtype = x.q.dtype
    grads = ChunkGrads(dq.astype(dtype), dk.astype(x.k.dtype), dv.astype(x.v.dtype), dlog_i, dlog_f)
    return grads, dfirst


def _row_grads(options: Options, rows: Rows, dh: Float[Array, "Z L V"]) -> _RowGrads:
    dtype = rows.m.dtype
    dh = dh.astype(dtype)
    if not options.normalize:
        return _RowGrads(dh, jnp.zeros_like(rows.d), jnp.zeros_like(rows.m))
    norm, by_d = row_norm(options, rows.m, rows.d)
    dnorm = -jnp.sum(dh * rows.h.astype(dtype), axis=-1) / norm
    # eps is added in the scaled domain: in units of the memory it is eps * exp(m).
    dm = jnp.where(rows.m >= READ_FLOOR, options.eps * dnorm, 0)
    return _RowGrads(dh / norm[..., None], jnp.where(by_d, jnp.sign(rows.d) * dnorm, 0), dm)


def _border_grads(x: Chunks, decays: Decays, drows: _RowGrads, q_across, starts, last, dlast):
    """Cotangents of the states leaving each chunk, what scaling those states costs, and d first."""
    dtype = starts.C.dtype
    read = product("ZLK,ZLV->ZKV", q_across.astype(x.v.dtype), _as(drows.u, x.v), dtype)
    read_n = jnp.sum(q_across * drows.d[..., None], axis=-2)
    m_end = jnp.concatenate([starts.m[last.m.size :], last.m])
    kept = jnp.exp(decays.across + starts.m - m_end)

    def step(carry, chunk):
        dC, dn, phi = carry
        kept, read, read_n, C, n = chunk
        dC_start = kept[..., None, None] * dC + read
        dn_start = kept[..., None] * dn + read_n
        phi_start = jnp.sum(dC_start * C, axis=(-2, -1)) + jnp.sum(dn_start * n, axis=-1)
        return (dC_start, dn_start, phi_start), carry

    first = (dlast.C, dlast.n, _inner(dlast, last))
    xs = tuple(by_position(a, last) for a in (kept, read, read_n, starts.C, starts.n))
    (dC, dn, dm), (dC_end, dn_end, phi) = jax.lax.scan(step, first, xs, reverse=True)
    dC_end, dn_end, phi = (in_one_row(a) for a in (dC_end, dn_end, phi))
    return (dC_end, dn_end, m_end), phi, MLSTMState(dC, dn, dm)


def _input_grads(
    options, x: Chunks, decays: Decays, starts, drows: _RowGrads, inside, across, dends
):
    dtype, scale = starts.C.dtype, x.q.shape[-1] ** -0.5
    dC_end, dn_end, m_end = dends
    C, dC_end = _as(starts.C, x.v), _as(dC_end, x.v)
    du = _as(drows.u, x.v)
    to_end = jnp.exp(decays.to_end - m_end[..., None])
    inside = scale * inside
    dS = (product("ZLV,ZSV->ZLS", du, x.v, dtype) + drows.d[..., None]) * inside
    P = product("ZLK,ZSK->ZLS", x.q, x.k, dtype) * inside
    dS, P = _as(dS, x.v), _as(P, x.v)
    read = product("ZLV,ZKV->ZLK", du, C, dtype)
    if options.normalize:
        read = read + drows.d[..., None] * starts.n[..., None, :]
    dq = product("ZLS,ZSK->ZLK", dS, x.k, dtype) + (scale * across)[..., None] * read
    written = product("ZSV,ZKV->ZSK", x.v, dC_end, dtype) + dn_end[..., None, :]
    dk = product("ZLS,ZLK->ZSK", dS, x.q, dtype) + to_end[..., None] * written
    keys = _as(to_end[..., None] * x.k, x.v)
    dv = product("ZLS,ZLV->ZSV", P, du, dtype)
    dv = dv + product("ZSK,ZKV->ZSV", keys, dC_end, dtype)
    return dq, dk, dv


def _scale_grads(gates: ChunkGates, m, m_start, dm, dm_last):
    """Gradient through m_t = max(log f_t + m_{t-1}, log i_t), along the path of the maximum.

    Args:
        gates, m, m_start: gates, m of every position and at chunk starts `Z`.
        dm: cotangent of m of every position `Z L`.
        dm_last: cotangent of the last m `Y`, beside `dm`.

    Returns cotangents of log i, log f, and of m before the first step.
    """
    before = jnp.concatenate([m_start[..., None], m[..., :-1]], axis=-1)
    if gates.reset is not None:
        before = jnp.where(gates.reset, 0, before)
    through_f = gates.log_f + before >= gates.log_i
    # The path to t starts anew where m came from i, or from the empty memory of a reset.
    kept = through_f if gates.reset is None else through_f & ~gates.reset
    segment = jnp.cumsum(~kept, axis=-1)
    whole = segment[..., -1] == 0
    entering = jnp.sum(jnp.where(segment == 0, dm, 0), axis=-1)

    def step(leaving, chunk):
        whole, entering = chunk
        return entering + jnp.where(whole, leaving, 0), leaving

    xs = tuple(a.reshape((-1,) + dm_last.shape) for a in (whole, entering))
    first, leaving = jax.lax.scan(step, dm_last, xs, reverse=True)
    total = _suffix_sum(dm, segment, in_one_row(leaving))
    return jnp.where(through_f, 0, total), jnp.where(through_f, total, 0), first


def _suffix_sum(
    x: Float[Array, "Z L"],
    segment: Int[Array, "Z L"] | None,
    leaving: Float[Array, "Z"],
) -> Float[Array, "Z L"]:
    """sum over t >= j of x_t in j's segment, plus `leaving` where that is the chunk's last one."""
    if segment is None:
        return jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True) + leaving[..., None]
    L = x.shape[-1]
    later = jnp.triu(jnp.ones((L, L), bool))[None]
    same = later & (segment[..., :, None] == segment[..., None, :])
    total = jnp.sum(jnp.where(same, x[..., None, :], 0), axis=-1)
    return total + jnp.where(segment == segment[..., -1:], leaving[..., None], 0)


def _inner(cotangent: MLSTMState, state: MLSTMState) -> Float[Array, "Y"]:
    """What scaling the whole state costs."""
    C = jnp.sum(cotangent.C * state.C, axis=(-2, -1))
    return C + jnp.sum(cotangent.n * state.n, axis=-1)


def _as(x: Array, like: Array) -> Array:
    return x.astype(like.dtype)
