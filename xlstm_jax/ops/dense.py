"""Products with a weight matrix, and with one matrix per group of features."""

import jax.numpy as jnp

from xlstm_jax.ops import cpu, dispatch
from xlstm_jax.typing import Array, Float

TILE = 256
"""Widest block that small groups are joined to: a product with zeros in it beats many tiny ones."""


def dense(
    x: Float[Array, "*batch F_in"],
    kernel: Float[Array, "F_in F_out"],
    *,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "*batch F_out"]:
    """x @ kernel, accumulated and returned in `dtype` (None: that of x); kernel is cast to x's."""
    dtype, kernel = jnp.dtype(dtype or x.dtype), kernel.astype(x.dtype)
    if cpu.is_single_cpu():
        return cpu.product(x, kernel, dtype)
    return jnp.dot(x, kernel, preferred_element_type=dtype)


def grouped_dense(
    x: Float[Array, "*batch F_in"],
    kernel: Float[Array, "P I O"],
    *,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "*batch F_out"]:
    """A product inside each of P equal groups of features: F_in = P * I, F_out = P * O.

    Groups are joined to block-diagonal matrices at most `TILE` wide: groups of 4, as the published
    models have them, are far below what a matrix unit works on.
    """
    P, rows, columns = kernel.shape
    if cpu.is_single_cpu() and max(rows, columns) <= cpu.SMALL_GROUP:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        parts = x.reshape(-1, P, rows)
        y = cpu.grouped_product(parts.astype(wide), kernel.astype(x.dtype).astype(wide))
        return y.reshape(*x.shape[:-1], P * columns).astype(dtype or x.dtype)
    most = max(1, TILE // max(rows, columns))
    joined = max(n for n in range(1, P + 1) if P % n == 0 and n <= most)
    blocks = kernel.reshape(P // joined, joined, rows, columns)
    eye = jnp.eye(joined, dtype=kernel.dtype)
    tiles = jnp.einsum("TPIO,PQ->TPIQO", blocks, eye).reshape(-1, joined * rows, joined * columns)
    if tiles.shape[0] == 1:
        return dense(x, tiles[0], dtype=dtype)
    parts, tiles = x.reshape(*x.shape[:-1], P // joined, joined * rows), tiles.astype(x.dtype)
    if dispatch.platform() == "cpu":
        # Its library refuses bfloat16 where groups are not the first axis (jaxlib 0.10.2).
        wide = jnp.promote_types(x.dtype, jnp.float32)
        parts, tiles = parts.astype(wide), tiles.astype(wide)
    y = jnp.einsum("...TI,TIO->...TO", parts, tiles, preferred_element_type=dtype or x.dtype)
    return y.reshape(*x.shape[:-1], P * columns)
