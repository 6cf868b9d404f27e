"""What the two passes of the chunkwise mLSTM share: inputs in chunks, weights of rows.

Chunks of all sequences and heads lie behind each other on one axis Z, position in the sequence
first (Z = N * B * H): loops over three axes are what XLA for CPUs makes fast. On a mesh, call these
functions on the shards.

Source: arXiv:2503.14376, section 3. Names: `u` is the unnormalized read-out, `d` its normalizer,
both divided by exp(m) with m the log-scale of the recurrence.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.mlstm.gates import (
    NEG,
    READ_FLOOR,
    Borders,
    LogGates,
    borders,
    log_i_for_m,
    lower_bound,
)
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.mlstm.arguments import Options
from xlstm_jax.typing import Array, Float


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


def end_max(gates: LogGates, total: tuple[Array, Array]) -> Float[Array, "Z"]:
    """The stabilizer of a chunk's last state, the initial state that a reset writes included."""
    return jnp.max(borders(gates._replace(log_i=log_i_for_m(gates)), total).to_end, axis=-1)


def source_decay(decays: Borders, log_i: Float[Array, "Z L"]) -> Float[Array, "Z L L"]:
    """log weight of source s (last axis) in row t; NEG where s > t or a reset lies between."""
    L, (coarse, fine, segment, *_) = log_i.shape[-1], decays
    seen = jnp.tril(jnp.ones((L, L), bool))[None]
    if segment is not None:
        seen = seen & (segment[..., :, None] == segment[..., None, :])
    coarse = coarse[..., :, None] - coarse[..., None, :]
    fine = fine[..., :, None] + (log_i - fine)[..., None, :]
    return jnp.where(seen, coarse + fine, NEG)


def row_weights(
    gates: LogGates, decays: Borders, m: Float[Array, "Z L"], m_start: Float[Array, "Z"]
) -> tuple[Float[Array, "Z L L"], Float[Array, "Z L"]]:
    """Factors of sources and of the state at the chunk's start, over e^m."""
    m = jnp.maximum(m, READ_FLOOR)
    source = source_decay(decays, gates.log_i)
    across = decays.to_row + m_start[..., None]
    return jnp.exp(source - m[..., None]), jnp.exp(across - m)


def row_norm(options: Options, m: Float[Array, "Z L"], d: Float[Array, "Z L"]):
    """The divisor of every position, and whether it is |d| (else a bound: no gradient to d)."""
    bound = lower_bound(m)
    return jnp.maximum(jnp.abs(d), bound) + options.eps, jnp.abs(d) > bound


def by_position(x: Array, state: MLSTMState) -> Array:
    """`Z ...` to `N Y ...`: chunks of a sequence, and sequences with their heads."""
    return x.reshape((-1,) + state.m.shape + x.shape[1:])


def merge_leading(x: Float[Array, "N Y ..."]) -> Float[Array, "Z ..."]:
    """The first two axes as one: the reverse of `by_position`, or `B H ...` to `Y ...`."""
    return x.reshape((-1,) + x.shape[2:])
