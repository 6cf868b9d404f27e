"""Kernels stored as 8-bit integers with one scale per output feature, for decoding."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Int8

from xlstm_jax.typing import Array, Float


class Int8Kernel(NamedTuple):
    """A kernel of about `values * scale`, half the size of bfloat16."""

    values: Int8[Array, "F_in F_out"]  # from -127 to 127
    scale: Float[Array, "F_out"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.values.shape

    def dequantize(self) -> Float[Array, "F_in F_out"]:
        """The kernel, as an array."""
        return self.values.astype(self.scale.dtype) * self.scale[None]


def quantize(kernel: Float[Array, "F_in F_out"]) -> Int8Kernel:
    """Rounds each weight to a multiple of 1/127 of the largest weight of its output feature."""
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(kernel), axis=0)
    scale = jnp.where(largest > 0, largest / 127, 1)
    return Int8Kernel(jnp.round(kernel / scale[None]).astype(jnp.int8), scale)


def int8_dense(
    x: Float[Array, "*batch F_in"], kernel: Int8Kernel, dtype: jnp.dtype
) -> Float[Array, "*batch F_out"]:
    """The product with the kernel, accumulated in float32 or wider and returned in `dtype`.

    Integers are cast within the product, so that only they are read from memory; the scale is
    applied to its result.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if x.size == x.shape[-1]:
        # XLA for GPUs casts an operand of a product in a pass of its own, but not that of a sum.
        terms = x.reshape(-1, 1).astype(wide) * kernel.values.astype(wide)
        y = jnp.sum(terms, axis=0).reshape(*x.shape[:-1], -1)
    else:
        y = jnp.dot(x, kernel.values.astype(x.dtype), preferred_element_type=wide)
    return (y * jnp.broadcast_to(kernel.scale.astype(wide), y.shape)).astype(dtype)
