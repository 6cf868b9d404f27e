"""Matrix products of features with a kernel, and with one kernel per group of features."""

import functools

import jax.numpy as jnp

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.ops import cpu, dispatch
from xlstm_jax.ops.int8 import Int8Kernel, int8_dense
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh, spec_of_groups, spec_of_product
from xlstm_jax.ops.sharded.shard_map import auto_mesh_axes, map_shards
from xlstm_jax.typing import Array, Float

TILE = 256
"""Maximum width of a block-diagonal tile: one product with zeros in it beats many tiny products."""


@on_any_mesh(spec_of_product)
def dense(
    x: Float[Array, "*batch F_in"],
    kernel: Float[Array, "F_in F_out"] | Int8Kernel,
    *,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "*batch F_out"]:
    """x @ kernel, accumulated and returned in `dtype` (None: that of x); kernel is cast to x's."""
    dtype = jnp.dtype(dtype or x.dtype)
    if isinstance(kernel, Int8Kernel):
        return int8_dense(x, kernel, dtype)
    if cpu.is_single_cpu():
        return cpu.matmul(dtype, x, kernel)
    return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=dtype)


@on_any_mesh(spec_of_groups)
def grouped_dense(
    x: Float[Array, "*batch F_in"], kernel: Float[Array, "P I O"], *, dtype: jnp.dtype | None = None
) -> Float[Array, "*batch F_out"]:
    """A product within each of P equal groups of features: F_in = P * I, F_out = P * O.

    Groups are combined into block-diagonal tiles at most `TILE` wide: groups of 4, as in the
    published models, are far smaller than the tiles of a matrix unit.
    """
    if x.ndim == 3 and auto_mesh_axes():
        # Each device has its groups: XLA would exchange features to combine tiles of them.
        local = functools.partial(_grouped_dense, dtype=dtype)
        sizes = dict(zip("BTF", (*x.shape[:2], kernel.shape[0]), strict=True))
        return map_shards(local, (x, kernel), ("B T F", "F I O"), "B T F", sizes)
    return _grouped_dense(x, kernel, dtype)


def _grouped_dense(x: Array, kernel: Array, dtype: jnp.dtype | None) -> Array:
    P, d_in, d_out = kernel.shape
    if cpu.is_single_cpu() and max(d_in, d_out) <= cpu.SMALL_GROUP:
        wide = state_dtype(x)
        groups = x.reshape(-1, P, d_in)
        # The kernel is rounded to the dtype of x first: the result is that of the other branch.
        y = cpu.grouped_matmul(groups.astype(wide), kernel.astype(x.dtype).astype(wide))
        return y.reshape(*x.shape[:-1], P * d_out).astype(dtype or x.dtype)
    max_per_tile = max(1, TILE // max(d_in, d_out))
    per_tile = max(n for n in range(1, P + 1) if P % n == 0 and n <= max_per_tile)
    blocks = kernel.reshape(P // per_tile, per_tile, d_in, d_out)
    eye = jnp.eye(per_tile, dtype=kernel.dtype)
    tiles = jnp.einsum("TPIO,PQ->TPIQO", blocks, eye).reshape(-1, per_tile * d_in, per_tile * d_out)
    if tiles.shape[0] == 1:
        return dense(x, tiles[0], dtype=dtype)
    parts, tiles = x.reshape(*x.shape[:-1], P // per_tile, per_tile * d_in), tiles.astype(x.dtype)
    if dispatch.platform() == "cpu":
        # Its matmul library rejects bfloat16 if the batch axis is not the first (jaxlib 0.10.2).
        wide = state_dtype(x)
        parts, tiles = parts.astype(wide), tiles.astype(wide)
    y = jnp.einsum("...TI,TIO->...TO", parts, tiles, preferred_element_type=dtype or x.dtype)
    return y.reshape(*x.shape[:-1], P * d_out)
