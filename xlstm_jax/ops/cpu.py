"""Workarounds for XLA on CPUs, each with what it gained. Elsewhere none of them does anything."""

import functools
import math

import jax
import jax.numpy as jnp

from xlstm_jax.ops import dispatch
from xlstm_jax.sharding.axes import free_axes
from xlstm_jax.typing import Array, Float, PyTree

SMALL_GROUP = 8
"""Groups at most so wide are multiplied element by element, as a CPU has no matrix unit to fill:
value and gradients of groups of 4 in 256 features took 1.3 ms of processor time instead of 12 ms
(2048 rows, float32, AMD EPYC, 2026-11-22)."""


def is_single_cpu() -> bool:
    """Whether a product runs on one CPU device. What is written for CPUs merges batch and time into
    one axis, which a mesh cannot shard by both."""
    return dispatch.platform() == "cpu" and not any(n > 1 for n in free_axes().values())


def materialize(x: PyTree) -> PyTree:
    """x, stored in memory before anything reads it.

    XLA for CPUs fuses elementwise work, transpositions and copies into every loop that reads their
    result, however often that loop reads each element: gates of L positions were summed and
    transposed anew for each of L x L weights, in a loop that no longer runs in vector registers
    (0.84 instead of 0.20 ms for 128 chunks of 64, AMD EPYC, 2026-11-23). A conditional is never
    fused, and a predicate behind a barrier never folded. The other branch is never taken. It costs
    one copy of x.

    It is needed for correctness where an operand of a product is one value repeated, such as the
    zeros of an initial state: XLA's library for CPUs reads past that value, and outputs of a
    sequence of one chunk were off by 1e8 times their size (jaxlib 0.10.2).
    """
    if dispatch.platform() != "cpu":
        return x
    yes = jax.lax.optimization_barrier(jnp.asarray(True))
    return jax.lax.cond(yes, lambda x: x, lambda x: jax.tree.map(jnp.zeros_like, x), x)


@jax.custom_vjp
def materialize_cotangent(x: Array) -> Array:
    """x, whose cotangent is stored before anything reads it; see `materialize`."""
    return x


materialize_cotangent.defvjp(lambda x: (x, None), lambda _, dx: (materialize(dx),))


def mean(x: Array) -> Array:
    """Over the last axis, which stays.

    XLA for CPUs is faster at a product than at a sum: value and gradient of a norm of heads of 64
    took 1.5 ms of processor time instead of 2.7 ms (8 x 256 x 256, AMD EPYC, 2026-11-22).
    """
    if dispatch.platform() != "cpu":
        return jnp.mean(x, axis=-1, keepdims=True)
    D = x.shape[-1]
    return jnp.dot(x, jnp.full((D, 1), 1 / D, x.dtype), precision=jax.lax.Precision.HIGHEST)


# XLA for CPUs fuses what makes the cotangent into the transposed copy that the weight's gradient
# would read, element by element against the grain, and computes it again for the input's gradient.
# Behind a barrier it is computed once, and no copy is needed: the train step of a four-block model
# of width 256 fell from 912 to 750 ms of processor time (AMD EPYC, 2026-11-22).
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """x @ kernel, accumulated and returned in `dtype`."""
    return jnp.dot(x, kernel, preferred_element_type=dtype)


def _product_backward(dtype, residuals, dy):
    x, kernel = residuals
    dy = jax.lax.optimization_barrier(dy.astype(x.dtype)).reshape(-1, dy.shape[-1])
    dx = jax.lax.dot_general(dy, kernel, (((1,), (1,)), ((), ())))
    return dx.reshape(x.shape), _weight_gradient(x.reshape(-1, x.shape[-1]), dy)


product.defvjp(lambda x, kernel, dtype: (product(x, kernel, dtype), (x, kernel)), _product_backward)

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


@jax.custom_vjp
def grouped_product(
    x: Float[Array, "N P I"], kernel: Float[Array, "P I O"]
) -> Float[Array, "N P O"]:
    """A product inside each of P small groups; see `SMALL_GROUP`."""
    # One feature of every group at a time, against contiguous weights.
    columns = jnp.moveaxis(kernel, 1, 0)
    y = sum(x[:, :, i, None] * columns[i][None] for i in range(kernel.shape[1]))
    return materialize(y)


def _grouped_backward(residuals, dy):
    x, kernel = residuals
    dy = materialize(dy)
    return grouped_product(dy, jnp.swapaxes(kernel, 1, 2)), _sum_of_outer_products(x, dy)


grouped_product.defvjp(lambda *inputs: (grouped_product(*inputs), inputs), _grouped_backward)


def _sum_of_outer_products(
    x: Float[Array, "N P I"], dy: Float[Array, "N P O"]
) -> Float[Array, "P I O"]:
    """sum over n of x[n] dy[n]', group by group: the sum stays in registers for 16 rows."""
    rows = 16

    def in_blocks(a):
        a = jnp.pad(a, ((0, -a.shape[0] % rows), (0, 0), (0, 0)))
        return a.reshape(-1, rows, *a.shape[1:])

    def add(total, now):
        x, dy = now
        return total + sum(x[r, :, :, None] * dy[r, :, None, :] for r in range(rows)), None

    zero = jnp.zeros((x.shape[1], x.shape[2], dy.shape[2]), x.dtype)
    return jax.lax.scan(add, zero, (in_blocks(x), in_blocks(dy)))[0]
