"""Module of the causal convolution."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from xlstm_jax.modules.initializers import uniform
from xlstm_jax.ops.conv import causal_conv
from xlstm_jax.typing import Array, Flag, Float, Size


class CausalConv(nn.Module):
    """Convolution over the last `width` steps; width 0 is the identity and has no parameters.

    It is depthwise unless `mixing` is set. Kernel and bias are initialized uniformly in
    +-1 / sqrt(fan-in).
    """

    width: int  # W
    mixing: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T F"],
        state: Float[Array, "B ... F"] | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
    ) -> tuple[Float[Array, "B T F"], Float[Array, "B ... F"]]:
        """Convolves x after the last W - 1 inputs in `state` (None: zeros); returns y and state."""
        features = x.shape[-1]
        if self.width == 0:
            return x, conv_state(x.shape[0], 0, features, x.dtype)
        window = (self.width, features, features) if self.mixing else (self.width, features)
        # The bias has the bound of the kernel, as in PyTorch's Conv1d.
        init = uniform(1 / math.sqrt(math.prod(window[:-1])))
        kernel = self.param("kernel", init, window).astype(x.dtype)
        bias = self.param("bias", init, (features,)).astype(x.dtype) if self.use_bias else None
        return causal_conv(x, kernel, bias, state, reset=reset, mask=mask)


def conv_state(
    batch_size: Size, width: int, features: int, dtype: DTypeLike
) -> Float[Array, "B ... F"]:
    """Initial state of a convolution: W - 1 inputs of zeros, none for a width of 0 or 1."""
    return jnp.zeros((batch_size, max(width - 1, 0), features), dtype)
