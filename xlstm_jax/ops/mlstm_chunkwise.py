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
    T = q.shape[1]
    x = _cut(options.chunk_size, q, k, v, gates)
    rows, starts, last = chunkwise_forward(options, x, state)
    return (_join(rows.h, T), last), (x, rows, starts, last)


def _backward(options: Options, residuals, cotangents):
    x, rows, starts, last = residuals
    dh, dlast = cotangents
    T = dh.shape[1]
    dh = _heads_first(_chunk(dh, options.chunk_size))
    grads, dstate = chunkwise_backward(options, x, rows, starts, last, dh, dlast)
    dq, dk, dv, dlog_i, dlog_f = (_join(g, T) for g in grads)
    return dq, dk, dv, LogGates(dlog_i, dlog_f, None), dstate


_chunkwise.defvjp(_forward, _backward)


def _cut(L: int, q, k, v, gates: LogGates) -> Chunks:
    """Chunks of length L; the last is filled with steps that write and forget nothing."""
    log_i = _heads_first(_chunk(gates.log_i, L, fill=NEG))
    log_f = _heads_first(_chunk(gates.log_f, L))
    reset = None if gates.reset is None else _chunk(gates.reset, L)[:, :, None]
    q, k, v = (_heads_first(_chunk(a, L)) for a in (q, k, v))
    return Chunks(q, k, v, ChunkGates(log_i, log_f, reset))


def _chunk(x: Array, L: int, fill: float = 0) -> Array:
    """`B T ...` to `N B L ...`."""
    B, T = x.shape[:2]
    pad = -T % L
    if pad:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape((B, -1, L) + x.shape[2:]), 1, 0)


def _heads_first(x: Array) -> Array:
    """`N B L H ...` to `N B H L ...`."""
    return jnp.swapaxes(x, 2, 3)


def _join(x: Array, T: int) -> Array:
    """`N B H L ...` to `B T H ...`, without what fills the last chunk."""
    x = jnp.moveaxis(jnp.swapaxes(x, 2, 3), 0, 1)
    return x.reshape((x.shape[0], -1) + x.shape[3:])[:, :T]
