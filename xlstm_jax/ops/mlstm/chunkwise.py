"""mLSTM in chunks: parallel inside a chunk, a recurrence over the states at chunk borders.

Source: arXiv:2503.14376 (tiled flash linear attention), section 3.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm.gates import (
    NEG,
    Borders,
    LogGates,
    borders,
    log_gates,
    log_i_for_m,
    running_sum,
    without_scale,
)
from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.cpu import materialize
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.ops.mlstm.chunks import (
    Chunks,
    Residuals,
    Rows,
    by_position,
    end_max,
    merge_leading,
    row_norm,
    row_weights,
    source_decay,
)
from xlstm_jax.ops.mlstm.chunkwise_backward import chunkwise_backward
from xlstm_jax.typing import Array, Float

CHUNK_SIZE = 64
"""Positions per chunk when none is given."""


def mlstm_chunkwise(
    x: Inputs, state: MLSTMState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """The op `mlstm` in its chunkwise form, with an exact hand-written gradient.

    Any T; memory grows with T, not with T * chunk_size.
    """
    q, k, v = (flags.zero_masked(a) for a in x[:3])
    gates = log_gates(x.i, x.f, *flags, input_gate=options.input_gate, dtype=state.C.dtype)
    if not options.max_state:
        state = MLSTMState(*without_scale(*state))
    L = min(options.chunk_size or CHUNK_SIZE, q.shape[1])
    h, state = _chunkwise(options, L, q, k, v, gates, state)  # pyright: ignore[reportGeneralTypeIssues]
    return flags.zero_masked(h), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunkwise(options: Options, L: int, q, k, v, gates: LogGates, state: MLSTMState):
    return _forward(options, L, q, k, v, gates, state)[0]


def _forward(options: Options, L: int, q, k, v, gates: LogGates, state: MLSTMState):
    B, T, H = q.shape[:3]
    x = _split(L, q, k, v, gates)
    # A product reads it: see `materialize` on operands that are one value repeated.
    first = materialize(jax.tree.map(merge_leading, state))
    decays = borders(x.gates, materialize(running_sum(x.gates)))
    starts, last = _border_states(options, x, decays, first)
    rows = _outputs(options, x, decays, starts)
    h = _join(rows.h, B, T, H)
    last_by_head = jax.tree.map(_reshape_like, last, state)
    return (h, last_by_head), Residuals(x, rows, starts, last)


def _backward(options: Options, L: int, saved: Residuals, cotangents):
    dh, dlast = cotangents
    B, T, H = dh.shape[:3]
    dh = _chunk(dh, L)
    flat = materialize(jax.tree.map(merge_leading, dlast))
    if not options.normalize:  # else the division by norms makes it more than a constant
        dh = materialize(dh)
    decays = borders(saved.x.gates, materialize(running_sum(saved.x.gates)))
    grads, dfirst = chunkwise_backward(options, saved, decays, dh, flat)
    dq, dk, dv, dlog_i, dlog_f = (_join(g, B, T, H) for g in grads)
    return dq, dk, dv, LogGates(dlog_i, dlog_f, None), jax.tree.map(_reshape_like, dfirst, dlast)


_chunkwise.defvjp(_forward, _backward)


def _border_states(options: Options, x: Chunks, decays: Borders, state: MLSTMState):
    """The states at chunk starts, leading axis Z, and the last; `state` has the leading axis Y."""
    # Increments are computed for all chunks at once, each in its own scale; the scan only adds.
    own = end_max(x.gates, decays[:2]) if options.max_state else jnp.zeros_like(decays.across)
    weight = jnp.exp(decays.to_end - own[..., None])[..., None]
    keys = weight * x.k
    C_new = exact_einsum("ZLK,ZLV->ZKV", keys.astype(x.v.dtype), x.v, dtype=state.C.dtype)
    n_new = jnp.sum(keys, axis=-2)
    news = tuple(by_position(a, state) for a in (decays.across, own, C_new, n_new))

    def step(state, chunk):
        across, own, C_new, n_new = chunk
        m = jnp.maximum(across + state.m, own) if options.max_state else state.m
        f_scaled, i_scaled = jnp.exp(across + state.m - m), jnp.exp(own - m)
        C = f_scaled[..., None, None] * state.C + i_scaled[..., None, None] * C_new
        n = f_scaled[..., None] * state.n + i_scaled[..., None] * n_new
        return MLSTMState(C, n, m), state

    last, starts = jax.lax.scan(step, state, news)
    return jax.tree.map(merge_leading, starts), last


def _outputs(options: Options, x: Chunks, decays: Borders, starts: MLSTMState) -> Rows:
    dtype, scale = starts.C.dtype, x.q.shape[-1] ** -0.5
    m = _row_scale(options, x.gates, decays, starts.m)
    inside, across = row_weights(x.gates, decays, m, starts.m)
    P = scale * exact_einsum("ZLK,ZSK->ZLS", x.q, x.k, dtype=dtype) * inside
    q = (scale * across)[..., None] * x.q
    u = exact_einsum("ZLS,ZSV->ZLV", P.astype(x.v.dtype), x.v, dtype=dtype)
    C = starts.C.astype(x.v.dtype)
    u = u + exact_einsum("ZLK,ZKV->ZLV", q.astype(x.v.dtype), C, dtype=dtype)
    if not options.normalize:
        return Rows(m, jnp.zeros_like(m), u.astype(x.v.dtype))
    d = jnp.sum(P, axis=-1) + jnp.sum(q * starts.n[..., None, :], axis=-1)
    norm, _ = row_norm(options, m, d)
    return Rows(m, d, (u / norm[..., None]).astype(x.v.dtype))


def _row_scale(options: Options, gates: LogGates, decays: Borders, m_start: Float[Array, "Z"]):
    """m of every position, as the step recurrence has it (0 without a max state)."""
    if not options.max_state:
        return jnp.zeros_like(gates.log_i)
    inside = source_decay(decays, log_i_for_m(gates))
    across = decays.to_row + m_start[..., None]
    return jnp.maximum(jnp.max(inside, axis=-1), across)


def _split(L: int, q, k, v, gates: LogGates) -> Chunks:
    """Chunks of length L; the last is padded with steps that write and forget nothing."""
    log_i, log_f = materialize((_chunk(gates.log_i, L, fill=NEG), _chunk(gates.log_f, L)))
    reset = gates.reset
    if reset is not None:
        reset = _chunk(jnp.broadcast_to(reset[..., None], gates.log_i.shape), L)
    q, k, v = (_chunk(a, L) for a in (q, k, v))
    return Chunks(q, k, v, LogGates(log_i, log_f, reset))


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


def _reshape_like(leaf: Array, like: Array) -> Array:
    return leaf.reshape(like.shape)
