"""Normalization layers.

The first generation stores a scale as its offset from one (`scale_offset`), the large architecture
stores the scale itself (`scale`). The names differ so that one is never restored as the other.
"""

import flax.linen as nn

from xlstm_jax.modules.initializers import ones, zeros
from xlstm_jax.ops.norm import layer_norm, multi_head_norm, rms_norm
from xlstm_jax.typing import Array, Float


class LayerNorm(nn.Module):
    """Layer norm, by default that of the first generation (arXiv:2405.04517)."""

    eps: float = 1e-5
    use_bias: bool = False
    as_offset: bool = True  # store the scale as its offset from one

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = _scale(self, x.shape[-1], as_offset=self.as_offset)
        bias = self.param("bias", zeros, x.shape[-1:]) if self.use_bias else None
        return layer_norm(x, scale, bias, eps=self.eps)


class RMSNorm(nn.Module):
    """RMS norm, by default that of the large architecture (arXiv:2503.13427)."""

    eps: float = 1e-6
    use_bias: bool = False
    as_offset: bool = False  # store the scale as its offset from one

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = _scale(self, x.shape[-1], as_offset=self.as_offset)
        bias = self.param("bias", zeros, x.shape[-1:]) if self.use_bias else None
        return rms_norm(x, scale, bias, eps=self.eps)


class MultiHeadNorm(nn.Module):
    """Layer norm of each head of a cell's output; returns the heads concatenated."""

    eps: float
    as_offset: bool  # store the scale as its offset from one, as in the first generation
    use_scale: bool = True
    use_bias: bool = False

    @nn.compact
    def __call__(self, h: Float[Array, "B T H V"]) -> Float[Array, "B T F"]:
        width = (h.shape[-2] * h.shape[-1],)
        scale = bias = None
        if self.use_scale:
            scale = _scale(self, width[0], as_offset=self.as_offset)
        if self.use_bias:
            bias = self.param("bias", zeros, width)
        return multi_head_norm(h, scale, bias, eps=self.eps)


class GroupNorm(nn.Module):
    """RMS norm of equal groups of features, with a scale for every feature (Mamba-2)."""

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
        scale = _scale(self, x.shape[-1], as_offset=False)
        y = rms_norm(x.reshape(*x.shape[:-1], self.groups, -1), eps=self.eps).reshape(x.shape)
        return y * scale.astype(y.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)


def _scale(norm: nn.Module, width: int, *, as_offset: bool) -> Float[Array, "D"]:
    """The scale of a norm, from its parameter."""
    if as_offset:
        return 1 + norm.param("scale_offset", zeros, (width,))
    return norm.param("scale", ones, (width,))
