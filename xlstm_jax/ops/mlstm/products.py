"""Products with operands in a narrow dtype, and sums and cotangents in a wide one."""

import jax.numpy as jnp

from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.ops.gradient import with_backward
from xlstm_jax.typing import Array


def product(spec: str, dtype: jnp.dtype, x: Array, y: Array) -> Array:
    """The einsum of x and y, rounded to `dtype`; the result and cotangents have the dtype of x.

    Autodiff would round cotangents to `dtype` too. The gradient of a gate is a difference of sums
    of them, in which their rounding errors would be far larger than the result.
    """
    return exact_einsum(spec, x, y) if x.dtype == dtype else _rounded(spec, dtype, x, y)


def _forward(spec: str, dtype: jnp.dtype, x: Array, y: Array):
    operands = x.astype(dtype), y.astype(dtype)
    return exact_einsum(spec, *operands, dtype=x.dtype), operands


def _backward(spec: str, dtype: jnp.dtype, operands, dz: Array):
    (x, y), wide = operands, dz.dtype
    left, right, out = spec.replace("->", ",").split(",")
    dz = dz.astype(dtype)
    dx = exact_einsum(f"{out},{right}->{left}", dz, y, dtype=wide)
    return dx, exact_einsum(f"{left},{out}->{right}", x, dz, dtype=wide)


_rounded = with_backward(_forward, _backward, num_static=2)
