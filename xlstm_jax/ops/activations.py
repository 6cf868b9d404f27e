"""Gated activations whose backward pass saves only their arguments.

Autodiff saves every intermediate result, and memory traffic is what elementwise functions cost. XLA
would also merge a recomputed sigmoid with that of the forward pass, and so save it anyway;
therefore the backward pass computes it as a hyperbolic tangent.
"""

import jax
import jax.numpy as jnp

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


def _sigmoid(x: Array, sign: float = 1.0) -> Array:
    return sign * 0.5 * jnp.tanh(sign * 0.5 * x) + 0.5


def _silu_and_slope(x: Array) -> tuple[Array, Array]:
    s = _sigmoid(x)
    return x * s, s + x * s * (1 - s)


def _silu_gate_backward(residuals, dy: Array):
    gate, x = residuals
    return dy * x * _silu_and_slope(gate)[1], dy * gate * _sigmoid(gate, -1)


def _sigmoid_gate_backward(residuals, dy: Array):
    gate, x = residuals
    s = _sigmoid(gate)
    return dy * x * s * (1 - s), dy * _sigmoid(gate, -1)


_silu = with_backward(lambda x: (jax.nn.silu(x), x), lambda x, dy: (dy * _silu_and_slope(x)[1],))
_silu_gate = with_backward(lambda gate, x: (jax.nn.silu(gate) * x, (gate, x)), _silu_gate_backward)
_sigmoid_gate = with_backward(
    lambda gate, x: (jax.nn.sigmoid(gate) * x, (gate, x)), _sigmoid_gate_backward
)
