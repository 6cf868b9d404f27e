"""Recurrent weights in the form in which a matrix unit takes them fastest: pairs of bfloat16 rows.

Inside VMEM two rows of bfloat16 share a word. Weights that lie in HBM as such words are loaded
whole; as plain bfloat16 they are loaded by halves and put together again at every step, which costs
a fifth to a quarter more bundles on v5e and v6e.

A float32 matrix is the sum of three bfloat16 ones, cut off bit for bit, so that no digit is lost:
it is split once and not at every step, as a product with `Precision.HIGHEST` would.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu

HIGH_BITS = -(1 << 16)
"""Keeps sign, exponent and seven digits of a float32: what a bfloat16 can hold."""


def num_terms(dtype: jnp.dtype) -> int:
    """How many bfloat16 matrices hold one of `dtype` exactly."""
    return 3 if dtype == jnp.float32 else 1


def pack(weights: jax.Array) -> jax.Array:
    """Rows in pairs: `H K J` of float32 or bfloat16 to `H terms K/2 J` of uint32; K is even."""
    bits = [jax.lax.bitcast_convert_type(term, jnp.uint16) for term in _split(weights)]
    even, odd = (jnp.stack(bits, axis=1)[:, :, row::2].astype(jnp.uint32) for row in (0, 1))
    return even | odd << 16


def times(a: jax.Array, words: jax.Array) -> jax.Array:
    """`a @ weights` in float32, inside a kernel.

    Args:
        a: `B K` in float32; it is rounded to bfloat16 where the weights are.
        words: `terms K/2 J`, one head of what `pack` returns.
    """
    matrices = [pltpu.bitcast(words[t], jnp.bfloat16) for t in range(words.shape[0])]
    if len(matrices) == 1:
        return tpu.product(a.astype(jnp.bfloat16), matrices[0])
    # All terms of `a` go through while one matrix is in the unit: loading that is what takes time.
    stacked = jnp.concatenate([t.astype(jnp.float32) for t in _split(a)]).astype(jnp.bfloat16)
    total = tpu.product(stacked, matrices[2])
    for matrix in (matrices[1], matrices[0]):
        total = total + tpu.product(stacked, matrix)
    B = a.shape[0]
    return total[2 * B :] + total[B : 2 * B] + total[:B]


def _split(x: jax.Array) -> list[jax.Array]:
    """bfloat16 arrays with the sum `x`."""
    if x.dtype == jnp.bfloat16:
        return [x]
    terms = []
    for _ in range(num_terms(x.dtype)):
        # By its bits: XLA may take a conversion to bfloat16 and back for the identity.
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & HIGH_BITS
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        terms.append(high.astype(jnp.bfloat16))
        x = x - high
    return terms
