"""Causal convolution with its parameters."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from xlstm_jax.modules.initializers import uniform
from xlstm_jax.ops.conv import causal_conv
from xlstm_jax.typing import Array, Bool, Float


class CausalConv(nn.Module):
    """Convolution over the last `width` steps; width 0 is the identity and has no parameters.

    Kernel and bias start uniform within 1 / sqrt(fan in). `mixing` lets channels mix.
    """

    width: int  # W
    mixing: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T F"],
        state: Float[Array, "B ... F"] | None = None,
        *,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T F"], Float[Array, "B ... F"]]:
        """`state`: the last W - 1 inputs, None for zeros. Returns (y, state)."""
        features = x.shape[-1]
        if self.width == 0:
            return x, conv_state(x.shape[0], 0, features, x.dtype)
        window = (self.width, features, features) if self.mixing else (self.width, features)
        init = uniform(1 / math.sqrt(math.prod(window[:-1])))
        kernel = self.param("kernel", init, window).astype(x.dtype)
        bias = self.param("bias", init, (features,)).astype(x.dtype)
        return causal_conv(x, kernel, bias, state, reset=reset, mask=mask)


def conv_state(
    batch_size: int, width: int, features: int, dtype: DTypeLike
) -> Float[Array, "B ... F"]:
    """The initial state of a convolution: its last inputs, none for a width of 0 or 1."""
    return jnp.zeros((batch_size, max(width - 1, 0), features), dtype)
