"""Sequences in chunks, and the decay of a linear memory within and across them.

The log of a decay weight is a difference of two prefix sums. Weights are computed from sums in two
parts, which do not cancel (`pallas_kernels.mlstm.gates.decays`), and are constants to autodiff. The
gradient of the decays enters by factors that are 1 (`gradient.times_unit`): exp(prefix) on what a
position reads, exp(-prefix) on what it writes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm import gates as pre
from xlstm_jax.typing import Array, Bool, Float, Shaped


class ChunkDecays(NamedTuple):
    """Weights of a memory that step t multiplies by exp(log_decay_t) before it writes."""

    within: Float[Array, "N B H L S"]  # of position s in the memory after position t >= s
    start: Float[Array, "N B H L"]  # of the memory before the chunk, after each position
    end: Float[Array, "N B H L"]  # of each position in the memory after the chunk
    across: Float[Array, "N B H"]  # of the memory before the chunk in that after it
    prefix: Float[Array, "N B H L"]  # sum of log decays since the last reset in the chunk


def split(x: Shaped[Array, "B T ..."], L: int) -> Shaped[Array, "N B L ..."]:
    """In chunks of L positions, the chunk index first; the last chunk is padded with zeros."""
    pad = -x.shape[1] % L
    if pad:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, L, *x.shape[2:]), 1, 0)


def join(x: Float[Array, "N B L ..."], T: int) -> Float[Array, "B T ..."]:
    """The inverse of `split`, without the padding."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def decays(
    log_decay: Float[Array, "B T H"], reset: Bool[Array, "B T"] | None, L: int
) -> ChunkDecays:
    """Weights for chunks of L positions; `log_decay` is 0 where masked, at most 0 elsewhere."""
    log_decay = jnp.maximum(jnp.moveaxis(split(log_decay, L), 2, 3), pre.NEG)
    if reset is not None:
        reset = jnp.broadcast_to(split(reset, L)[:, :, None], log_decay.shape)
    zeros = jnp.zeros_like(log_decay)
    gates = jax.lax.stop_gradient(pre.LogGates(zeros, log_decay, reset))
    first = zeros[..., 0]
    sums = pre.decays(gates, zeros, first, first, forget_gate="sigmoid")
    visible = jnp.tril(jnp.ones((L, L), bool)).reshape(1, 1, 1, L, L)
    if sums.segment is not None:
        visible &= sums.segment[..., :, None] == sums.segment[..., None, :]
    # Coarse parts are subtracted first: their difference is exact.
    source = (sums.coarse[..., :, None] - sums.coarse[..., None, :]) + (
        sums.fine[..., :, None] - sums.fine[..., None, :]
    )
    return ChunkDecays(
        within=jnp.exp(jnp.where(visible, source, pre.NEG)),
        start=jnp.exp(sums.from_start),
        end=jnp.exp(sums.to_end),
        across=jnp.exp(sums.across),
        prefix=pre.prefix_sum(log_decay, reset),
    )
