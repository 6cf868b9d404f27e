"""Norms over the last axis, and the soft cap. Statistics are float32, or wider if x is wider.

Source: arXiv:2405.04517, appendix; arXiv:2503.13427, section 3 (RMS norm, soft cap).
"""

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.ops.cpu import mean
from xlstm_jax.ops.gradient import with_backward
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh, spec_of
from xlstm_jax.typing import Array, Float


@on_any_mesh(spec_of)
def layer_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, "D"] | None = None,
    bias: Float[Array, "D"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "... D"]:
    """Subtract the mean, divide by the (biased) standard deviation, then scale and shift."""
    y: Array = _standardize("layer", eps, x.astype(state_dtype(x)))
    return _affine(y, scale, bias).astype(x.dtype)


@on_any_mesh(spec_of)
def rms_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, "D"] | None = None,
    bias: Float[Array, "D"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Array, "... D"]:
    """Divide by the root of the mean square, then scale and shift."""
    y: Array = _standardize("rms", eps, x.astype(state_dtype(x)))
    return _affine(y, scale, bias).astype(x.dtype)


@on_any_mesh("B T F")
def multi_head_norm(
    h: Float[Array, "B T H V"],
    scale: Float[Array, "F"] | None = None,
    bias: Float[Array, "F"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "B T F"]:
    """Layer norm of each head; heads are then concatenated (F = H * V), scaled and shifted."""
    B, T, H, V = h.shape
    # Cast here, so that scale and shift are in float32 too.
    y = layer_norm(h.astype(state_dtype(h)), eps=eps).reshape(B, T, H * V)
    return _affine(y, scale, bias).astype(h.dtype)


def unit_norm(x: Float[Array, "... D"], *, eps: float = 1e-6) -> Float[Array, "... D"]:
    """x / sqrt(|x|^2 + eps): a vector of length 1 unless x is tiny."""
    D = x.shape[-1]
    return rms_norm(x, eps=eps / D) * D**-0.5


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(x / cap): the identity near 0, bounded by +-cap. `None` returns x unchanged."""
    return x if cap is None else cap * jnp.tanh(x / cap)


# The gradient is written by hand: it needs only y and one number per vector as residuals, and two
# independent means.
def _forward(kind: str, eps: float, x: Array):
    x = x - mean(x) if kind == "layer" else x
    scale = jax.lax.rsqrt(mean(jnp.square(x)) + eps)
    return x * scale, (x * scale, scale)


def _backward(kind: str, eps: float, residuals, dy: Array):
    del eps  # included in `scale`
    y, scale = residuals
    # Remove the components of dy along y and, for layer norm, along a constant shift: the norm does
    # not depend on scale and shift of x (up to eps).
    dx = dy - y * mean(y * dy)
    return (scale * (dx - mean(dy) if kind == "layer" else dx),)


_standardize = with_backward(_forward, _backward, num_static=2)


def _affine(y: Array, scale: Array | None, bias: Array | None) -> Array:
    # Explicit casts and axes of size 1: users and tests may forbid implicit promotion.
    if scale is not None:
        y = y * scale.astype(y.dtype).reshape((1,) * (y.ndim - 1) + scale.shape)
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + bias.shape)
    return y
