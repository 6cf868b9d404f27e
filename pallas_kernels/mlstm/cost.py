"""Work and traffic of the mLSTM kernels by formula, for XLA's scheduler and for tests.

Per token and head, with F the share of a chunk's square that is computed (whole strips up to the
diagonal): forward 4 K V + 2 F L (K + V) operations, backward 8 K V + 2 F L (3 K + 2 V).
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mlstm.options import Options


def forward(
    options: Options, B: int, T: int, H: int, K: int, V: int, dtype: jnp.dtype, *, save: bool
) -> pl.CostEstimate:
    """What `mlstm_forward` does; bytes are those between HBM and the chip."""
    square = _share(options) * options.chunk
    item = jnp.dtype(dtype).itemsize
    read = (2 * K + V) * item + 8 * 4
    written = V * item
    states = 2 * (K * V + K) * 4  # first and last
    if save:
        written += 4
        kept = K * V * item + 4 * K
        states += (T // options.chunk) * kept
    return pl.CostEstimate(
        flops=round(B * H * T * (4 * K * V + 2 * square * (K + V))),
        transcendentals=round(B * H * T * square),
        bytes_accessed=B * H * (T * (read + written) + states),
    )


def backward(
    options: Options, B: int, T: int, H: int, K: int, V: int, dtype: jnp.dtype
) -> pl.CostEstimate:
    """What `mlstm_backward` does."""
    square = _share(options) * options.chunk
    item = jnp.dtype(dtype).itemsize
    tokens = (4 * K + (4 if options.normalize else 3) * V) * item + 12 * 4
    saved = K * V * item + 4 * K
    states = (T // options.chunk) * saved + 2 * (K * V + K) * 4
    return pl.CostEstimate(
        flops=round(B * H * T * (8 * K * V + 2 * square * (3 * K + 2 * V))),
        transcendentals=round(B * H * T * square),
        bytes_accessed=B * H * (T * tokens + states),
    )


def step(B: int, H: int, K: int, V: int, dtype: jnp.dtype) -> pl.CostEstimate:
    """What `mlstm_decode` does: it reads the state once and writes it once."""
    item = jnp.dtype(dtype).itemsize
    tokens = (2 * K + 2 * V) * item
    return pl.CostEstimate(
        flops=B * H * 5 * K * V,
        transcendentals=0,
        bytes_accessed=B * H * (8 * (K * V + K) + tokens),
    )


def _share(options: Options) -> float:
    return (1 + options.tile.strip / options.chunk) / 2
