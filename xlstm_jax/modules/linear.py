"""Linear maps: dense, head-wise, and the table of token vectors.

All compute in the dtype of their input; parameters are float32 and cast at use.
"""

import flax.linen as nn
import jax.numpy as jnp

from xlstm_jax import ops
from xlstm_jax.modules.initializers import Initializer, zeros
from xlstm_jax.typing import Array, Float


class Dense(nn.Module):
    """y = x kernel (+ bias).

    `wide` asks for the product's own accumulator, float32 or wider, instead of x's dtype: gates and
    logits are not rounded to bfloat16.
    """

    features: int
    kernel_init: Initializer
    use_bias: bool = False
    bias_init: Initializer = zeros
    wide: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch F_in"]) -> Float[Array, "*batch F_out"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        dtype = jnp.promote_types(x.dtype, jnp.float32) if self.wide else x.dtype
        y = ops.dense(x, kernel, dtype=dtype)
        if self.use_bias:
            y = y + jnp.broadcast_to(self.param("bias", self.bias_init, y.shape[-1:]), y.shape)
        return y.astype(dtype)


class HeadwiseDense(nn.Module):
    """A dense map inside each of P equal groups of features; groups do not mix.

    The kernel has the shape (P, F_in / P, F_out / P). `wide` as in `Dense`.
    """

    features: int
    num_groups: int  # P
    kernel_init: Initializer
    use_bias: bool = False
    wide: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch F_in"]) -> Float[Array, "*batch F_out"]:
        P, F_in, F_out = self.num_groups, x.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, (P, F_in // P, F_out // P))
        dtype = jnp.promote_types(x.dtype, jnp.float32) if self.wide else x.dtype
        y = ops.grouped_dense(x, kernel, dtype=dtype)
        if self.use_bias:
            y = y + jnp.broadcast_to(self.param("bias", zeros, (F_out,)), y.shape)
        return y.astype(dtype)


class Embedding(nn.Module):
    """The table of token vectors; the model looks tokens up in it and may use it as its head."""

    vocab_size: int
    dim: int
    embedding_init: Initializer

    @nn.compact
    def __call__(self) -> Float[Array, "vocab D"]:
        return self.param("embedding", self.embedding_init, (self.vocab_size, self.dim))
