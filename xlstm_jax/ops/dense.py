"""Products with a weight matrix, and with one matrix per group of features."""

import functools

import jax
import jax.numpy as jnp

from xlstm_jax.ops import dispatch
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
    most = max(1, TILE // max(rows, columns))
    joined = max(n for n in range(1, P + 1) if P % n == 0 and n <= most)
    blocks = kernel.reshape(P // joined, joined, rows, columns)
    eye = jnp.eye(joined, dtype=kernel.dtype)
    tiles = jnp.einsum("TPIO,PQ->TPIQO", blocks, eye).reshape(-1, joined * rows, joined * columns)
    if tiles.shape[0] == 1:
        return dense(x, tiles[0], dtype=dtype)
    parts = x.reshape(*x.shape[:-1], P // joined, joined * rows)
    y = jnp.einsum(
        "...TI,TIO->...TO", parts, tiles.astype(x.dtype), preferred_element_type=dtype or x.dtype
    )
    return y.reshape(*x.shape[:-1], P * columns)


def _product(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    if dispatch.platform() == "cpu":
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
    return dx.reshape(x.shape), jax.lax.dot_general(flat, dy, (((0,), (0,)), ((), ())))


_cpu_product.defvjp(_forward, _backward)
