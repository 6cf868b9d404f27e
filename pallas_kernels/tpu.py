"""What the Pallas kernels for TPUs share: chip, compiler parameters, products, transposed rows."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.hardware import TPU_DEVICE_KINDS

SCOPED_BYTES = 16 << 20
"""VMEM of a kernel unless it asks for more: all that the smallest TPU has."""


IN_ORDER = ("parallel", "parallel", "arbitrary")
"""Semantics of a grid: batch and heads in any order, a sequence in order."""


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
    """What every kernel is compiled with.

    Args:
        semantics: "parallel" or "arbitrary" (in order) for each axis of the grid.
        vmem_bytes: the kernel's limit of VMEM; None is the compiler's default.
    """
    # Imported here: finding out the chip needs nothing of Pallas.
    from jax.experimental.pallas import tpu as pltpu

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
