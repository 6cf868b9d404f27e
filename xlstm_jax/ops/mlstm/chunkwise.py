"""mLSTM in chunks: parallel inside a chunk, a recurrence over the states at chunk borders.

Source: arXiv:2503.14376 (tiled flash linear attention), section 3.
"""

import functools

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import NEG
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.mlstm_backward import chunkwise_backward
from xlstm_jax.ops.mlstm_forward import Chunks, Options, chunkwise_forward
from xlstm_jax.ops.mlstm_gates import ChunkGates, LogGates, log_gates
from xlstm_jax.ops.once import computed_once, stored
from xlstm_jax.typing import Array, Bool, Float

CHUNK_SIZE = 64
"""Positions per chunk when none is given."""


def mlstm_chunkwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    i: Float[Array, "B T H"],
    f: Float[Array, "B T H"],
    state: MLSTMState,
    *,
    reset: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    input_gate: str = "exp",
    normalize: bool = True,
    eps: float = 1e-6,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """The op `mlstm` in its chunkwise form, with an exact hand-written gradient.

    Any T; memory grows with T, not with T * chunk_size. Arguments as in `ops.mlstm`.
    """
    if mask is not None:
        q, k, v = (jnp.where(mask[..., None, None], a, 0) for a in (q, k, v))
    gates = log_gates(i, f, reset, mask, input_gate=input_gate, dtype=state.C.dtype)
    if input_gate == "sigmoid":
        state = without_scale(state)
    options = Options(
        chunk_size=min(chunk_size or CHUNK_SIZE, q.shape[1]),
        max_state=input_gate == "exp",
        normalize=normalize,
        eps=eps,
    )
    h, state = _chunkwise(options, q, k, v, gates, state)  # pyright: ignore[reportGeneralTypeIssues]
    return h if mask is None else jnp.where(mask[..., None, None], h, 0), state


def without_scale(state: MLSTMState) -> MLSTMState:
    """The same memory with m = 0."""
    factor = jnp.exp(state.m)
    return MLSTMState(
        factor[..., None, None] * state.C, factor[..., None] * state.n, jnp.zeros_like(state.m)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(options: Options, q, k, v, gates: LogGates, state: MLSTMState):
    return _forward(options, q, k, v, gates, state)[0]


def _forward(options: Options, q, k, v, gates: LogGates, state: MLSTMState):
    B, T, H = q.shape[:3]
    x = _cut(options.chunk_size, q, k, v, gates)
    first = stored(jax.tree.map(_heads_in_one_row, state))
    rows, starts, last = chunkwise_forward(options, x, first)
    h = _join(rows.h, B, T, H)
    return (h, jax.tree.map(_by_head, last, state)), (x, rows, starts, last)


def _backward(options: Options, residuals, cotangents):
    x, rows, starts, last = residuals
    dh, dlast = cotangents
    B, T, H = dh.shape[:3]
    dh = _chunk(dh, options.chunk_size)
    flat = stored(jax.tree.map(_heads_in_one_row, dlast))
    if not options.normalize:  # else the division by norms makes it more than a constant
        dh = stored(dh)
    grads, dfirst = chunkwise_backward(options, x, rows, starts, last, dh, flat)
    dq, dk, dv, dlog_i, dlog_f = (_join(g, B, T, H) for g in grads)
    return dq, dk, dv, LogGates(dlog_i, dlog_f, None), jax.tree.map(_by_head, dfirst, dlast)


_chunkwise.defvjp(_forward, _backward)


def _cut(L: int, q, k, v, gates: LogGates) -> Chunks:
    """Chunks of length L; the last is filled with steps that write and forget nothing."""
    log_i = _chunk(gates.log_i, L, fill=NEG)
    log_f = _chunk(gates.log_f, L)
    log_i, log_f = computed_once((log_i, log_f))
    reset = gates.reset
    if reset is not None:
        reset = _chunk(jnp.broadcast_to(reset[..., None], gates.log_i.shape), L)
    q, k, v = (_chunk(a, L) for a in (q, k, v))
    return Chunks(q, k, v, ChunkGates(log_i, log_f, reset))


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
    """`Z L ...` to `B T H ...`, without what fills the last chunk."""
    x = x.reshape((-1, B, H) + x.shape[1:])
    x = jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))
    return x.reshape((B, -1, H) + x.shape[4:])[:, :T]


def _heads_in_one_row(leaf: Array) -> Array:
    """`B H ...` to `B * H ...`."""
    return leaf.reshape((-1,) + leaf.shape[2:])


def _by_head(leaf: Array, like: Array) -> Array:
    return leaf.reshape(like.shape)
