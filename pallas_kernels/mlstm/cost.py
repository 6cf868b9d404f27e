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
    """What `mlstm_backward` does."""
    item = jnp.dtype(dtype).itemsize
    tokens = (4 * K + (4 if options.normalize else 3) * V) * item + 12 * 4
    states = (T // options.chunk) * (K * V * item + 4 * K) + 2 * (K * V + K) * 4
    return _estimate(options, B * H, T, (8 * K * V, 2 * (3 * K + 2 * V)), tokens, states)


def _estimate(options, heads, T, operations, tokens, states) -> pl.CostEstimate:
    """From operations of a position and of a pair of positions, bytes of a position and a head."""
    pairs = (options.chunk + options.tile.strip) / 2  # of each position
    return pl.CostEstimate(
        flops=round(heads * T * (operations[0] + pairs * operations[1])),
        transcendentals=round(heads * T * pairs),
        bytes_accessed=heads * (T * tokens + states),
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
