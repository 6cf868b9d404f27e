"""Chunkwise mLSTM, backward: the exact gradient, rematerializing what one chunk needs.

The log-scale m of a state is a gauge: moving a factor between exp(m) and (C, n) changes nothing.
So gradients of the gates follow from scale symmetries (`k_s` appears only as exp(log i_s) k_s, and
a state only under the product of the forget gates since), and m itself matters in two places alone:
in eps, which is added in the scaled domain, and in a loss on the returned C, n and m.

Source of the forward pass: arXiv:2503.14376, section 3; the derivation of the gradient is ours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm.gates import (
    READ_FLOOR,
    Borders,
    path_of_maximum,
    scale_grads,
    suffix_sum,
)
from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.mlstm.arguments import Options
from xlstm_jax.ops.mlstm.chunks import (
    Chunks,
    Residuals,
    Rows,
    by_position,
    merge_leading,
    row_norm,
    row_weights,
)
from xlstm_jax.typing import Array, Float


class ChunkGrads(NamedTuple):
    """Cotangents of the inputs; those of the gates are of their logarithms."""

    q: Float[Array, "Z L K"]
    k: Float[Array, "Z L K"]
    v: Float[Array, "Z L V"]
    log_i: Float[Array, "Z L"]
    log_f: Float[Array, "Z L"]


class _RowGrads(NamedTuple):
    """Cotangents of a row's read-out `u`, of its normalizer `d`, and of its log-scale `m`."""

    u: Float[Array, "Z L V"]
    d: Float[Array, "Z L"]
    m: Float[Array, "Z L"]


def chunkwise_backward(
    options: Options,
    saved: Residuals,
    decays: Borders,
    dh: Float[Array, "Z L V"],
    dlast: MLSTMState,
) -> tuple[ChunkGrads, MLSTMState]:
    """Cotangents of the inputs and of the state before the first step."""
    x, rows, starts, last = saved
    drows = _row_grads(options, rows, dh)
    inside, across = row_weights(x.gates, decays, rows.m, starts.m)
    q_across = (x.q.shape[-1] ** -0.5 * across)[..., None] * x.q
    dends, phi, dfirst = _border_grads(saved, decays, drows, q_across, dlast)
    dq, dk, dv = _input_grads(options, x, decays, starts, drows, inside, across, dends)
    dlog_i = jnp.sum(x.k * dk, axis=-1)
    flow = jnp.sum(x.q * dq, axis=-1) - dlog_i
    dlog_f = suffix_sum(flow, phi, decays.segment, x.gates.reset)
    if options.max_state:
        rho = dlast.m - _inner(dlast, last)
        through_f, kept = path_of_maximum(x.gates, rows.m, starts.m)
        leaving = _leaving(kept, drows.m, rho)
        gauge_i, gauge_f, gauge_m = scale_grads(through_f, kept, leaving, drows.m)
        dlog_i, dlog_f = dlog_i + gauge_i, dlog_f + gauge_f
        dfirst = dfirst._replace(m=dfirst.m + by_position(gauge_m, last)[0])
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
    # eps is added in the scaled domain: in units of the state it is eps * exp(m).
    dm = jnp.where(rows.m >= READ_FLOOR, options.eps * dnorm, 0)
    return _RowGrads(dh / norm[..., None], jnp.where(by_d, jnp.sign(rows.d) * dnorm, 0), dm)


def _border_grads(saved: Residuals, decays: Borders, drows: _RowGrads, q_across, dlast):
    """Cotangents of the states leaving each chunk, what scaling those states costs, and d first."""
    x, _, starts, last = saved
    dtype = starts.C.dtype
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
    xs = tuple(by_position(a, last) for a in (f_scaled, read, read_n, starts.C, starts.n))
    (dC, dn, dm), (dC_end, dn_end, phi) = jax.lax.scan(step, first, xs, reverse=True)
    dC_end, dn_end, phi = (merge_leading(a) for a in (dC_end, dn_end, phi))
    return (dC_end, dn_end, m_end), phi, MLSTMState(dC, dn, dm)


def _input_grads(
    options, x: Chunks, decays: Borders, starts, drows: _RowGrads, inside, across, dends
):
    dtype, scale = starts.C.dtype, x.q.shape[-1] ** -0.5
    dC_end, dn_end, m_end = dends
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


def _as(x: Array, like: Array) -> Array:
    return x.astype(like.dtype)
