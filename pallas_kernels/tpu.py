"""What the Pallas kernels for TPUs share: chip, compiler parameters, products, packed weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import common
from pallas_kernels.hardware import TPU_DEVICE_KINDS

SCOPED_BYTES = 16 << 20
"""VMEM of a kernel unless it asks for more: all that the smallest TPU has."""

IN_ORDER = ("parallel", "parallel", "arbitrary")
"""Semantics of a grid: batch and heads in any order, a sequence in order."""

HIGH_BITS = -(1 << 16)
"""Keeps sign, exponent and seven digits of a float32: what a bfloat16 can hold."""


def current_chip() -> str | None:
    """The key in `hardware.TPUS` of the chip that functions traced now run on, or None."""
    return common.target() or TPU_DEVICE_KINDS.get(jax.devices()[0].device_kind)


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Matrix product over one axis of each, in float32; float32 operands keep all their digits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def compiler_params(semantics: tuple[str, ...], vmem_bytes: int | None) -> Any:
    """What every kernel is compiled with; `vmem_bytes` None is the compiler's default limit."""
    return pltpu.CompilerParams(
        dimension_semantics=semantics,  # pyright: ignore[reportArgumentType]
        vmem_limit_bytes=vmem_bytes,
        # Blocks are whole parts of their arrays, so no copy can leave one: the interpreter raises
        # where it would. The checks cost up to 5 % of all bundles on a v5p.
        disable_bounds_checks=True,
    )


def column(row: jax.Array) -> jax.Array:
    """`1 L` to `L 1`, by a mask and a sum: a reshape of lanes to sublanes is not on every chip."""
    return jnp.sum(jnp.where(_diagonal(row.shape[1]), row, 0.0), axis=1, keepdims=True)


def as_row(column: jax.Array) -> jax.Array:
    """`L 1` to `1 L`, by a mask and a sum."""
    return jnp.sum(jnp.where(_diagonal(column.shape[0]), column, 0.0), axis=0, keepdims=True)


def _diagonal(size: int) -> jax.Array:
    square = (size, size)
    rows = jax.lax.broadcasted_iota(jnp.int32, square, 0)
    return rows == jax.lax.broadcasted_iota(jnp.int32, square, 1)


def num_terms(dtype: jnp.dtype) -> int:
    """How many bfloat16 matrices hold one of `dtype` exactly."""
    return 3 if dtype == jnp.float32 else 1


def pack(weights: jax.Array) -> jax.Array:
    """Rows in pairs: `H K J` of float32 or bfloat16 to `H terms K/2 J` of uint32; K is even.

    In VMEM two rows of bfloat16 share a word. Weights that lie in HBM as such words are loaded at
    once; as plain bfloat16 they are loaded by halves and joined at every step, which costs a fifth
    to a quarter more bundles on v5e and v6e. A float32 matrix is the sum of three bfloat16 ones,
    split bit for bit, once and not at every step as a product with `Precision.HIGHEST` would.
    """
    bits = [jax.lax.bitcast_convert_type(term, jnp.uint16) for term in _split(weights)]
    even, odd = (jnp.stack(bits, axis=1)[:, :, row::2].astype(jnp.uint32) for row in (0, 1))
    return even | odd << 16


def times(a: jax.Array, words: jax.Array) -> jax.Array:
    """`a @ weights` in float32, inside a kernel; `words` are one head of what `pack` returns.

    `a` is `B K` in float32; it is rounded to bfloat16 where the weights are.
    """
    matrices = [pltpu.bitcast(words[t], jnp.bfloat16) for t in range(words.shape[0])]
    if len(matrices) == 1:
        return product(a.astype(jnp.bfloat16), matrices[0])
    # All terms of `a` go through while one matrix is in the unit: loading that is what takes time.
    stacked = jnp.concatenate([t.astype(jnp.float32) for t in _split(a)]).astype(jnp.bfloat16)
    total = product(stacked, matrices[2])
    for matrix in (matrices[1], matrices[0]):
        total = total + product(stacked, matrix)
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
