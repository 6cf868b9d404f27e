"""Shared by the Pallas TPU kernels: chip, compiler parameters, matrix products, packed weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import common
from pallas_kernels.hardware import TPU_DEVICE_KINDS

SCOPED_BYTES = 16 << 20
"""Default VMEM limit of a kernel, which is all the VMEM of the smallest TPU."""

DIMENSION_SEMANTICS = ("parallel", "parallel", "arbitrary")
"""Of a grid (batch, heads, blocks of time): blocks of time run in order, they carry the state."""

HIGH_BITS = -(1 << 16)
"""Masks a float32 to sign, exponent and 7 mantissa bits, which a bfloat16 represents exactly."""


def current_chip() -> str | None:
    """The key in `hardware.TPUS` of the target or current chip; None: not a known TPU."""
    return common.target() or TPU_DEVICE_KINDS.get(jax.devices()[0].device_kind)


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Matrix product, contracting one axis of each operand, accumulated in float32.

    float32 operands are multiplied with `Precision.HIGHEST`.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def compiler_params(semantics: tuple[str, ...], vmem_bytes: int | None) -> Any:
    """Compiler parameters of every kernel; `vmem_bytes` None is the compiler's default limit."""
    return pltpu.CompilerParams(
        dimension_semantics=semantics,  # pyright: ignore[reportArgumentType]
        vmem_limit_bytes=vmem_bytes,
        # Block shapes divide their arrays, so no DMA is out of bounds; the interpreter would raise
        # if one were. The checks cost up to 5 % of all bundles on a v5p.
        disable_bounds_checks=True,
    )


def to_sublanes(x: jax.Array) -> jax.Array:
    """`1 L` to `L 1`, by a mask and a sum: not every chip can reshape lanes to sublanes."""
    return jnp.sum(jnp.where(_diagonal(x.shape[1]), x, 0.0), axis=1, keepdims=True)


def to_lanes(x: jax.Array) -> jax.Array:
    """`L 1` to `1 L`, by a mask and a sum."""
    return jnp.sum(jnp.where(_diagonal(x.shape[0]), x, 0.0), axis=0, keepdims=True)


def _diagonal(size: int) -> jax.Array:
    sublane, lane = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return sublane == lane


def num_terms(dtype: jnp.dtype) -> int:
    """Number of bfloat16 matrices whose sum is exactly a matrix of `dtype`."""
    return 3 if dtype == jnp.float32 else 1


def pack_weights(weights: jax.Array) -> jax.Array:
    """Packs pairs of rows: `H K J` in float32 or bfloat16 to `H terms K/2 J` in uint32; K is even.

    VMEM stores two rows of bfloat16 in one word. Weights stored in HBM as such words load directly;
    plain bfloat16 weights are loaded in halves and repacked at every step, which costs 20 to 25 %
    more bundles on v5e and v6e. A float32 matrix is split bit for bit into three bfloat16 ones,
    once, whereas a product with `Precision.HIGHEST` would split it at every step.
    """
    bits = [jax.lax.bitcast_convert_type(term, jnp.uint16) for term in _split(weights)]
    even, odd = (jnp.stack(bits, axis=1)[:, :, parity::2].astype(jnp.uint32) for parity in (0, 1))
    return even | odd << 16


def packed_matmul(a: jax.Array, words: jax.Array) -> jax.Array:
    """`a @ weights` in float32, inside a kernel; `words` is one head of a `pack_weights` result.

    `a` is `B K` in float32; it is rounded to bfloat16 if the weights are bfloat16.
    """
    matrices = [pltpu.bitcast(words[t], jnp.bfloat16) for t in range(words.shape[0])]
    if len(matrices) == 1:
        return product(a.astype(jnp.bfloat16), matrices[0])
    # Loading a matrix into the MXU dominates, so each one multiplies all terms of `a` at once.
    stacked = jnp.concatenate([t.astype(jnp.float32) for t in _split(a)]).astype(jnp.bfloat16)
    total = product(stacked, matrices[2])
    for matrix in (matrices[1], matrices[0]):
        total = total + product(stacked, matrix)
    B = a.shape[0]
    return total[2 * B :] + total[B : 2 * B] + total[:B]


def _split(x: jax.Array) -> list[jax.Array]:
    """bfloat16 arrays whose sum is exactly `x`."""
    if x.dtype == jnp.bfloat16:
        return [x]
    terms = []
    for _ in range(num_terms(x.dtype)):
        # Masks the bits, because XLA may fold a conversion to bfloat16 and back into the identity.
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & HIGH_BITS
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        terms.append(high.astype(jnp.bfloat16))
        x = x - high
    return terms
