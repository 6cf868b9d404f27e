"""FLOPs and HBM traffic of the mLSTM kernels by formula, for XLA's scheduler and for tests.

FLOPs per token and head: forward 4 K V + 2 F L (K + V), backward 8 K V + 2 F L (3 K + 2 V), where F
is the fraction of a chunk's L x L matrix that is computed: all strips up to the diagonal. If G
heads share a tile, all products but those that update the state are G times as wide in K.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mlstm.options import Options
from pallas_kernels.mlstm.tpu_layout import Heads


def forward(
    options: Options, heads: Heads, B: int, T: int, H: int, dtype: jnp.dtype, *, save: bool
) -> pl.CostEstimate:
    """Cost of `mlstm_forward`; bytes are those moved from and to HBM."""
    item, (G, K, V) = jnp.dtype(dtype).itemsize, heads
    tokens = (2 * K + 2 * V) * item + 8 * 4
    states = (1 if options.zero_state else 2) * (K * V + K) * 4  # first and last
    if save:
        tokens += 4
        states += (T // options.chunk) * (K * V * item + 4 * K)
    return _estimate(options, B * H, T, (2 * (G + 1) * K * V, 2 * (G * K + V)), tokens, states)


def backward(
    options: Options, heads: Heads, B: int, T: int, H: int, dtype: jnp.dtype, *, given: bool
) -> pl.CostEstimate:
    """Cost of `mlstm_backward`; `given`: whether the last state has a cotangent that is not 0."""
    item, (G, K, V) = jnp.dtype(dtype).itemsize, heads
    tokens = (4 * K + (4 if options.normalize else 3) * V) * item + 12 * 4
    states = (T // options.chunk) * (K * V * item + 4 * K)
    states += (given + (not options.zero_state)) * (K * V + K) * 4  # last and first
    flops = 2 * (3 * G + 1) * K * V, 2 * (3 * G * K + 2 * V)
    return _estimate(options, B * H, T, flops, tokens, states)


def _estimate(options, heads, T, flops, token_bytes, head_bytes) -> pl.CostEstimate:
    """From FLOPs per (position, pair of positions), bytes per position and bytes per head."""
    pairs = (options.chunk + options.tile.strip) / 2  # keys computed per query, on average
    return pl.CostEstimate(
        flops=round(heads * T * (flops[0] + pairs * flops[1])),
        transcendentals=round(heads * T * pairs),
        bytes_accessed=heads * (T * token_bytes + head_bytes),
    )


def step(B: int, H: int, K: int, V: int, dtype: jnp.dtype) -> pl.CostEstimate:
    """Cost of `mlstm_decode`, which reads the state once and writes it once."""
    item = jnp.dtype(dtype).itemsize
    tokens = (2 * K + 2 * V) * item
    return pl.CostEstimate(
        flops=B * H * 5 * K * V,
        transcendentals=0,
        bytes_accessed=B * H * (8 * (K * V + K) + tokens),
    )
