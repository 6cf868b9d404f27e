"""Chunkwise mLSTM, forward: states at chunk borders, then all chunks at once.

Chunks of all sequences and heads lie behind each other on one axis Z, position in the sequence
first (Z = N * B * H): loops over three axes are what XLA for CPUs makes fast. In a mesh, call these
functions on the shards.

Source: arXiv:2503.14376, section 3. Names: `u` is the unnormalised read-out, `d` its normaliser,
both divided by exp(m) with m the log-scale of the recurrence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.mlstm import READ_FLOOR, TINY, MLSTMState
from xlstm_jax.ops.mlstm_gates import ChunkGates, Decays, chunk_decays, source_decay
from xlstm_jax.typing import Array, Float


class Options(NamedTuple):
    """What does not change while a program runs."""

    chunk_size: int
    max_state: bool  # the exponential input gate: m follows the gates; else m is 0 everywhere
    normalize: bool
    eps: float


class Chunks(NamedTuple):
    """Inputs cut into chunks."""

    q: Float[Array, "Z L K"]
    k: Float[Array, "Z L K"]
    v: Float[Array, "Z L V"]
    gates: ChunkGates


class Rows(NamedTuple):
    """What the backward pass needs of every position besides the inputs."""

    m: Float[Array, "Z L"]  # log-scale of the recurrence after this step
    d: Float[Array, "Z L"]  # signed normaliser
    h: Float[Array, "Z L V"]


def product(spec: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """An einsum accumulated in `dtype`; float32 operands are never rounded to fewer digits."""
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)


def chunkwise_forward(
    options: Options, x: Chunks, state: MLSTMState
) -> tuple[Rows, MLSTMState, MLSTMState]:
    """Outputs of every position.

    State leaves have one leading axis, Y = B * H. Returns rows (h in the dtype of v), the states at
    chunk starts (leading axis Z), and the last.
    """
    decays = chunk_decays(x.gates)
    starts, last = _border_states(options, x, decays, state)
    return _outputs(options, x, decays, starts), starts, last


def _border_states(options: Options, x: Chunks, decays: Decays, state: MLSTMState):
    # Increments are computed for all chunks at once, each in its own scale; the scan only adds.
    own = decays.end_max if options.max_state else jnp.zeros_like(decays.end_max)
    weight = jnp.exp(decays.to_end - own[..., None])[..., None]
    keys = weight * x.k
    C_new = product("ZLK,ZLV->ZKV", keys.astype(x.v.dtype), x.v, state.C.dtype)
    n_new = jnp.sum(keys, axis=-2)
    news = tuple(by_position(a, state) for a in (decays.across, own, C_new, n_new))

    def step(state, chunk):
        across, own, C_new, n_new = chunk
        m = jnp.maximum(across + state.m, own) if options.max_state else state.m
        kept, added = jnp.exp(across + state.m - m), jnp.exp(own - m)
        C = kept[..., None, None] * state.C + added[..., None, None] * C_new
        n = kept[..., None] * state.n + added[..., None] * n_new
        return MLSTMState(C, n, m), state

    last, starts = jax.lax.scan(step, state, news)
    return jax.tree.map(in_one_row, starts), last


def by_position(x: Float[Array, "Z ..."], state: MLSTMState) -> Float[Array, "N Y ..."]:
    """The leading axis in two: chunks of a sequence, and sequences with their heads."""
    return x.reshape((-1,) + state.m.shape + x.shape[1:])


def in_one_row(x: Float[Array, "N Y ..."]) -> Float[Array, "Z ..."]:
    """The reverse of `by_position`."""
    return x.reshape((-1,) + x.shape[2:])


def _row_scale(options: Options, gates: ChunkGates, decays: Decays, m_start: Float[Array, "Z"]):
    """m of every position, as the step recurrence has it (0 without a max state)."""
    if not options.max_state:
        return jnp.zeros_like(gates.log_i)
    inside = source_decay(decays, gates.log_i_or_start)
    across = decays.to_row + m_start[..., None]
    return jnp.maximum(jnp.max(inside, axis=-1), across)


def row_weights(
    gates: ChunkGates, decays: Decays, m: Float[Array, "Z L"], m_start: Float[Array, "Z"]
) -> tuple[Float[Array, "Z L L"], Float[Array, "Z L"]]:
    """Factors of sources and of the state at the chunk's start, over e^m."""
    m = jnp.maximum(m, READ_FLOOR)
    source = source_decay(decays, gates.log_i)
    across = decays.to_row + m_start[..., None]
    return jnp.exp(source - m[..., None]), jnp.exp(across - m)


def row_norm(options: Options, m: Float[Array, "Z L"], d: Float[Array, "Z L"]):
    """The divisor of every position, and whether it is |d| (else a bound: no gradient to d)."""
    bound = jnp.maximum(jnp.exp(-jnp.maximum(m, READ_FLOOR)), TINY)
    return jnp.maximum(jnp.abs(d), bound) + options.eps, jnp.abs(d) > bound


def _outputs(options: Options, x: Chunks, decays: Decays, starts: MLSTMState) -> Rows:
    dtype, scale = starts.C.dtype, x.q.shape[-1] ** -0.5
    m = _row_scale(options, x.gates, decays, starts.m)
    inside, across = row_weights(x.gates, decays, m, starts.m)
    P = scale * product("ZLK,ZSK->ZLS", x.q, x.k, dtype) * inside
    q = (scale * across)[..., None] * x.q
    u = product("ZLS,ZSV->ZLV", P.astype(x.v.dtype), x.v, dtype)
    u = u + product("ZLK,ZKV->ZLV", q.astype(x.v.dtype), starts.C.astype(x.v.dtype), dtype)
    if not options.normalize:
        return Rows(m, jnp.zeros_like(m), u.astype(x.v.dtype))
    d = jnp.sum(P, axis=-1) + jnp.sum(q * starts.n[..., None, :], axis=-1)
    norm, _ = row_norm(options, m, d)
    return Rows(m, d, (u / norm[..., None]).astype(x.v.dtype))
