"""FLOPs and HBM traffic of the mLSTM kernels by formula, for XLA's scheduler and for tests.

FLOPs per token and head: forward 4 K V + 2 F L (K + V), backward 8 K V + 2 F L (3 K + 2 V), where F
is the fraction of a chunk's L x L matrix that is computed: all strips up to the diagonal.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mlstm.options import Options


def forward(
    options: Options, B: int, T: int, H: int, K: int, V: int, dtype: jnp.dtype, *, save: bool
) -> pl.CostEstimate:
    """Cost of `mlstm_forward`; bytes are those moved from and to HBM."""
    item = jnp.dtype(dtype).itemsize
    tokens = (2 * K + 2 * V) * item + 8 * 4
    states = 2 * (K * V + K) * 4  # first and last
    if save:
        tokens += 4
        states += (T // options.chunk) * (K * V * item + 4 * K)
    return _estimate(options, B * H, T, (4 * K * V, 2 * (K + V)), tokens, states)


def backward(
    options: Options, B: int, T: int, H: int, K: int, V: int, dtype: jnp.dtype
) -> pl.CostEstimate:
    """Cost of `mlstm_backward`."""
    item = jnp.dtype(dtype).itemsize
    tokens = (4 * K + (4 if options.normalize else 3) * V) * item + 12 * 4
    states = (T // options.chunk) * (K * V * item + 4 * K) + 2 * (K * V + K) * 4
    return _estimate(options, B * H, T, (8 * K * V, 2 * (3 * K + 2 * V)), tokens, states)


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
