"""Workarounds for XLA's CPU backend, each with its measured gain; other platforms use none."""

import math

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import common_dtype, state_dtype
from xlstm_jax.cells.time import vary_like
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.gradient import with_backward
from xlstm_jax.sharding.axes import free_axes
from xlstm_jax.typing import Array, Float, PyTree

SMALL_GROUP = 8
"""Widest groups that are multiplied elementwise, as a CPU has no matrix unit to fill: value and
gradients of groups of 4 in 256 features took 1.3 ms of CPU time instead of 12 ms (N = 2048,
float32, AMD EPYC, 2026-11-22)."""


def is_single_cpu() -> bool:
    """Whether a product runs on a single CPU device.

    The products below merge batch and time into one axis, which a mesh cannot shard by both.
    """
    return dispatch.platform() == "cpu" and not any(n > 1 for n in free_axes().values())


def materialize(x: PyTree) -> PyTree:
    """x, stored in memory before it is used, so that XLA cannot fuse its producer into consumers.

    XLA's CPU backend fuses elementwise ops, transposes and copies into every loop that reads their
    result, however often that loop reads each element: gates of L positions were summed and
    transposed again for each of L x L weights, in a loop that was no longer vectorized (0.84
    instead of 0.20 ms for 128 chunks of 64, AMD EPYC, 2026-11-23). It costs one copy of x.

    It is needed for correctness where an operand of a product is a broadcast constant, such as the
    zeros of an initial state: XLA's CPU matmul library reads past that value, and outputs of a
    sequence of one chunk were off by 1e8 times their size (jaxlib 0.10.2).
    """
    if dispatch.platform() != "cpu":
        return x
    # XLA never fuses a conditional, and does not constant-fold a predicate behind a barrier. The
    # other branch is never taken.
    true = jax.lax.optimization_barrier(jnp.asarray(True))
    return jax.lax.cond(true, lambda x: x, lambda x: jax.tree.map(jnp.zeros_like, x), x)


materialize_cotangent = with_backward(lambda x: (x, None), lambda _, dx: (materialize(dx),))
"""x; its cotangent is stored in memory before it is used, see `materialize`."""


def mean(x: Array) -> Array:
    """Mean over the last axis, with `keepdims`.

    XLA's CPU backend is faster at a product than at a sum: value and gradient of a norm of heads of
    64 took 1.5 ms of CPU time instead of 2.7 ms (8 x 256 x 256, AMD EPYC, 2026-11-22).
    """
    if dispatch.platform() != "cpu":
        return jnp.mean(x, axis=-1, keepdims=True)
    D = x.shape[-1]
    return jnp.dot(x, jnp.full((D, 1), 1 / D, x.dtype), precision=jax.lax.Precision.HIGHEST)


# XLA's CPU backend fuses the producer of the cotangent into the transposed copy that the kernel's
# gradient reads, with strided access, and recomputes it for the input's gradient. Behind a
# barrier it is computed once, without a copy: the train step of a four-block model of width 256
# fell from 912 to 750 ms of CPU time (AMD EPYC, 2026-11-22).
def _matmul(dtype: jnp.dtype, x: Array, kernel: Array):
    if x.size == x.shape[-1] and x.size % 2 == 0:
        return _vector_product(x, kernel.astype(x.dtype), dtype), (x, kernel)
    return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=dtype), (x, kernel)


def _vector_product(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """x @ kernel for a single vector x, in two halves of its features.

    XLA's CPU backend uses one core for a product with a vector, but one for each product of a
    batch: the products of a decode step with 94 MB of weights took 1.64 instead of 1.88 ms (two
    cores, AMD EPYC, 2026-11-30).
    """
    K, N = kernel.shape
    halves = x.reshape(2, 1, K // 2), kernel.reshape(2, K // 2, N)
    axes = (((2,), (1,)), ((0,), (0,)))
    wide = state_dtype(x)
    y = jax.lax.dot_general(*halves, axes, preferred_element_type=wide)
    return jnp.sum(y, axis=0).reshape(*x.shape[:-1], N).astype(dtype)


def _matmul_backward(dtype, residuals, dy):
    del dtype
    x, kernel = residuals
    dy = jax.lax.optimization_barrier(dy.astype(x.dtype)).reshape(-1, dy.shape[-1])
    dx = jax.lax.dot_general(dy, kernel.astype(x.dtype), (((1,), (1,)), ((), ())))
    # Summed in the dtype of the kernel, which may be wider than that of activations.
    dkernel = _kernel_grad(x.reshape(-1, x.shape[-1]), dy, common_dtype(x.dtype, kernel.dtype))
    return dx.reshape(x.shape), dkernel.astype(kernel.dtype)


matmul = with_backward(_matmul, _matmul_backward, num_static=1)
"""(dtype, x, kernel) -> x @ kernel, accumulated and returned in `dtype`; kernel is cast to x's."""

_NARROW_WIDTH, _PARTIAL_SUMS = 16, 16


def _kernel_grad(
    x: Float[Array, "N F_in"], dy: Float[Array, "N F_out"], dtype: jnp.dtype
) -> Float[Array, "F_in F_out"]:
    """x' dy in `dtype`; for narrow kernels as a few partial sums over N, transposed.

    XLA's CPU backend is slow at one long sum: 0.10 instead of 0.75 ms of CPU time for N = 2048 and
    256 x 8 features (float32, AMD EPYC, 2026-11-23).
    """
    partial_sums = math.gcd(x.shape[0], _PARTIAL_SUMS)
    if dy.shape[1] > _NARROW_WIDTH or partial_sums == 1:
        axes = (((0,), (0,)), ((), ()))
        return jax.lax.dot_general(x, dy, axes, preferred_element_type=dtype)
    x, dy = (a.reshape(partial_sums, -1, a.shape[-1]) for a in (x, dy))
    # Partial sums are added in float32 at least: rounding each to bfloat16 would lose digits.
    wide = state_dtype(x)
    parts = jax.lax.dot_general(dy.astype(wide), x.astype(wide), (((1,), (1,)), ((0,), (0,))))
    return jnp.sum(parts, axis=0).T.astype(dtype)


def _grouped_matmul(x: Float[Array, "N P I"], kernel: Float[Array, "P I O"]):
    # One input feature of all groups at a time, times contiguous weights.
    by_feature = jnp.moveaxis(kernel, 1, 0)
    y = sum(x[:, :, i, None] * by_feature[i][None] for i in range(kernel.shape[1]))
    return materialize(y), (x, kernel)


def _grouped_backward(residuals, dy):
    x, kernel = residuals
    dy = materialize(dy)
    return grouped_matmul(dy, jnp.swapaxes(kernel, 1, 2)), _sum_of_outer_products(x, dy)


grouped_matmul = with_backward(_grouped_matmul, _grouped_backward)
"""A product within each of P small groups, (`N P I`, `P I O`) -> `N P O`; see `SMALL_GROUP`."""


def _sum_of_outer_products(
    x: Float[Array, "N P I"], dy: Float[Array, "N P O"]
) -> Float[Array, "P I O"]:
    """sum over n of x[n] dy[n]' per group."""
    block = 16  # terms that are summed in registers before the total is updated in memory

    def in_blocks(a):
        a = jnp.pad(a, ((0, -a.shape[0] % block), (0, 0), (0, 0)))
        return a.reshape(-1, block, *a.shape[1:])

    def add(total, xs):
        x, dy = xs
        return total + sum(x[n, :, :, None] * dy[n, :, None, :] for n in range(block)), None

    zero = jnp.zeros((x.shape[1], x.shape[2], dy.shape[2]), x.dtype)
    return jax.lax.scan(add, vary_like(zero, (x, dy)), (in_blocks(x), in_blocks(dy)))[0]
