"""Norms over the last axis, and the soft cap. Statistics are float32, or wider where x is.

Source: arXiv:2405.04517, appendix; arXiv:2503.13427, section 3 (RMS norm, soft cap).
"""

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.typing import Array, Float


def layer_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, "D"] | None = None,
    bias: Float[Array, "D"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "... D"]:
    """Subtract the mean, divide by the (biased) standard deviation, then scale and shift."""
    y = x.astype(state_dtype(x))
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return _affine(y, scale, bias).astype(x.dtype)


def rms_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, "D"] | None = None,
    bias: Float[Array, "D"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Array, "... D"]:
    """Divide by the root of the mean square, then scale and shift."""
    y = x.astype(state_dtype(x))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return _affine(y, scale, bias).astype(x.dtype)


def multi_head_norm(
    h: Float[Array, "B T H V"],
    scale: Float[Array, "F"] | None = None,
    bias: Float[Array, "F"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "B T F"]:
    """Layer norm of each head apart; heads are then joined (F = H * V), scaled and shifted."""
    B, T, H, V = h.shape
    y = layer_norm(h.astype(state_dtype(h)), eps=eps).reshape(B, T, H * V)
    return _affine(y, scale, bias).astype(h.dtype)


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(x / cap): the identity near 0, never beyond +-cap. `None` leaves x as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _affine(y, scale, bias):
    if scale is not None:
        y = y * scale.reshape((1,) * (y.ndim - 1) + scale.shape)
    if bias is not None:
        y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
    return y
