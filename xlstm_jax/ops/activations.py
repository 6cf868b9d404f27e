"""Gated activations whose backward pass saves only their arguments.

Autodiff saves every intermediate result, and memory traffic is what elementwise functions cost. XLA
merges equal expressions of the forward and backward pass, and of two gradients, and then stores
them from the forward pass on. So the backward pass computes each sigmoid by another expression.
"""

import functools

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.cells.time import vary_like
from xlstm_jax.ops.gradient import with_backward
from xlstm_jax.typing import Array, Float


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(x)."""
    return _silu(x)


def silu_gate(gate: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """silu(gate) x."""
    return _silu_gate(*vary_like((gate, x), None))


def sigmoid_gate(gate: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """sigmoid(gate) x."""
    return _sigmoid_gate(*vary_like((gate, x), None))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sigmoid(form: str, x: Array) -> Array:
    # The exponent is never positive, and small results keep their digits.
    e = jnp.exp(-jnp.abs(x) if form == "abs" else jnp.minimum(x, -x))
    return jnp.where(x >= 0, 1, e) / (1 + e)


@_sigmoid.defjvp
def _sigmoid_jvp(form: str, primals, tangents):
    # Of the second derivative; that of the expression is wrong at 0.
    s = _sigmoid(form, *primals)
    return s, tangents[0] * s * (1 - s)


def _silu_slope(x: Array) -> Array:
    s = _sigmoid("abs", x)
    return s + x * s * (1 - s)


def _silu_backward(x: Array, dy: Array):
    wide, dy = _widen(x, dy)
    return ((dy * _silu_slope(wide)).astype(x.dtype),)


def _silu_gate_backward(residuals, dy: Array):
    gate, x, dy = _widen(*residuals, dy)
    dgate, dx = dy * x * _silu_slope(gate), dy * gate * _sigmoid("min", gate)
    return dgate.astype(residuals[0].dtype), dx.astype(residuals[1].dtype)


def _sigmoid_gate_backward(residuals, dy: Array):
    gate, x, dy = _widen(*residuals, dy)
    s = _sigmoid("abs", gate)
    dgate, dx = dy * x * s * (1 - s), dy * _sigmoid("min", gate)
    return dgate.astype(residuals[0].dtype), dx.astype(residuals[1].dtype)


def _widen(*arrays: Array) -> list[Array]:
    dtype = state_dtype(*arrays)
    return [a.astype(dtype) for a in arrays]


_remat = functools.partial(with_backward, rematerialize=True)
_silu = _remat(lambda x: (jax.nn.silu(x), x), _silu_backward)
_silu_gate = _remat(lambda gate, x: (jax.nn.silu(gate) * x, (gate, x)), _silu_gate_backward)
_sigmoid_gate = _remat(
    lambda gate, x: (jax.nn.sigmoid(gate) * x, (gate, x)), _sigmoid_gate_backward
)
