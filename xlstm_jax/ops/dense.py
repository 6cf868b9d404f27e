"""Products with a weight matrix, and with one matrix per group of features."""

import functools
import math

import jax
import jax.numpy as jnp

from xlstm_jax.ops import dispatch
from xlstm_jax.ops.once import computed_once
from xlstm_jax.sharding.axes import free_axes
from xlstm_jax.typing import Array, Float

TILE = 256
"""Widest block that small groups are joined to: a product with zeros in it beats many tiny ones."""

CPU_SMALL_GROUP = 8
"""Groups at most so wide are multiplied element by element on a CPU, which has no matrix unit to
fill: value and gradients of groups of 4 in 256 features took 1.3 ms of processor time instead of
12 ms (2048 rows, float32, AMD EPYC, 2026-11-22)."""


def dense(
    x: Float[Array, "*batch F_in"],
    kernel: Float[Array, "F_in F_out"],
    *,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "*batch F_out"]:
    """x @ kernel, accumulated and returned in `dtype` (None: that of x); kernel is cast to x's."""
    return _product(x, kernel.astype(x.dtype), jnp.dtype(dtype or x.dtype))


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
    if _on_one_cpu() and max(rows, columns) <= CPU_SMALL_GROUP:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        parts = x.reshape(-1, P, rows)
        y = _cpu_groups(parts.astype(wide), kernel.astype(x.dtype).astype(wide))
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


def _on_one_cpu() -> bool:
    """What is written for CPUs joins rows and time on one axis, which a mesh cannot cut by both."""
    return dispatch.platform() == "cpu" and not any(n > 1 for n in free_axes().values())


def _product(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    if _on_one_cpu():
        return _cpu_product(x, kernel, dtype)
    return jnp.dot(x, kernel, preferred_element_type=dtype)


# XLA for CPUs fuses what makes the cotangent into the transposed copy that the weight's gradient
# would read, element by element against the grain, and makes it a second time for the input's
# gradient. Held back by a barrier it is made once, and no copy is needed: the train step of a
# four-block model of width 256 fell from 912 to 750 ms of processor time (AMD EPYC, 2026-11-22).
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cpu_product(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    return jnp.dot(x, kernel, preferred_element_type=dtype)


def _forward(x, kernel, dtype):
    return _cpu_product(x, kernel, dtype), (x, kernel)


def _backward(dtype, residuals, dy):
    x, kernel = residuals
    dy = jax.lax.optimization_barrier(dy.astype(x.dtype)).reshape(-1, dy.shape[-1])
    dx = jax.lax.dot_general(dy, kernel, (((1,), (1,)), ((), ())))
    flat = x.reshape(-1, x.shape[-1])
    return dx.reshape(x.shape), _weight_gradient(flat, dy)


_NARROW, _SUMS = 16, 16


def _weight_gradient(
    x: Float[Array, "N F_in"], dy: Float[Array, "N F_out"]
) -> Float[Array, "F_in F_out"]:
    """x' dy; a narrow one as a few sums over part of the rows each, transposed.

    XLA for CPUs is slow at one long sum: 0.10 instead of 0.75 ms of processor time for 2048 rows,
    256 and 8 features (float32, AMD EPYC, 2026-11-23).
    """
    sums = math.gcd(x.shape[0], _SUMS)
    if dy.shape[1] > _NARROW or sums == 1:
        return jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))
    x, dy = (a.reshape(sums, -1, a.shape[-1]) for a in (x, dy))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    parts = jax.lax.dot_general(dy.astype(wide), x.astype(wide), (((1,), (1,)), ((0,), (0,))))
    return jnp.sum(parts, axis=0).T.astype(x.dtype)


_cpu_product.defvjp(_forward, _backward)


@jax.custom_vjp
def _cpu_groups(x: Float[Array, "N P I"], kernel: Float[Array, "P I O"]) -> Float[Array, "N P O"]:
    # One feature of every group at a time, against contiguous weights.
    columns = jnp.moveaxis(kernel, 1, 0)
    y = sum(x[:, :, i, None] * columns[i][None] for i in range(kernel.shape[1]))
    return computed_once(y)


def _groups_forward(x, kernel):
    return _cpu_groups(x, kernel), (x, kernel)


def _groups_backward(residuals, dy):
    x, kernel = residuals
    dy = computed_once(dy)
    return _cpu_groups(dy, jnp.swapaxes(kernel, 1, 2)), _sum_of_outer_products(x, dy)


_cpu_groups.defvjp(_groups_forward, _groups_backward)

_ROWS_AT_ONCE = 16


def _sum_of_outer_products(
    x: Float[Array, "N P I"], dy: Float[Array, "N P O"]
) -> Float[Array, "P I O"]:
    """sum over n of x[n] dy[n]', group by group: the sum stays in registers for some rows."""
    rows = _ROWS_AT_ONCE

    def cut(a):
        a = jnp.pad(a, ((0, -a.shape[0] % rows), (0, 0), (0, 0)))
        return a.reshape(-1, rows, *a.shape[1:])

    def add(total, now):
        x, dy = now
        return total + sum(x[r, :, :, None] * dy[r, :, None, :] for r in range(rows)), None

    zero = jnp.zeros((x.shape[1], x.shape[2], dy.shape[2]), x.dtype)
    return jax.lax.scan(add, zero, (cut(x), cut(dy)))[0]
