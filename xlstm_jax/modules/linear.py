"""Linear maps: dense, head-wise, and the table of token vectors.

All compute in the dtype of their input; parameters are float32 and cast at use.
"""

import functools
import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from xlstm_jax.modules.initializers import Initializer, zeros
from xlstm_jax.ops.dense import dense, grouped_dense
from xlstm_jax.sharding import is_sharded
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
    def weights(
        self, in_dim: int
    ) -> tuple[Float[Array, "F_in F_out"], Float[Array, "F_out"] | None]:
        """The parameters: kernel, and bias if there is one."""
        kernel = self.param("kernel", self.kernel_init, (in_dim, self.features))
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        return kernel, bias

    def __call__(self, x: Float[Array, "*batch F_in"]) -> Float[Array, "*batch F_out"]:
        return dense_together(x, self)[0]


def dense_together(
    x: Float[Array, "*batch F_in"] | Sequence[Float[Array, "*batch F"]], *layers: Dense
) -> list[Array]:
    """What each layer makes of the same x, by one product with all kernels side by side.

    One product is faster than several, forward and backward; parameters stay those of each layer.
    Where devices share the features, the products are apart.
    All layers must have the same `wide`. Where x comes in parts, it stands for them joined.
    """
    if len(layers) > 1 and is_sharded("inner"):
        # Side by side, each device would hold columns of other kernels than of its own.
        return [y for layer in layers for y in dense_together(x, layer)]
    parts = x if isinstance(x, Sequence) else (x,)
    dtype = parts[0].dtype
    dtype = jnp.promote_types(dtype, jnp.float32) if any(y.wide for y in layers) else dtype
    in_dim = sum(part.shape[-1] for part in parts)
    kernels, biases = zip(*(layer.weights(in_dim) for layer in layers), strict=True)
    kernel = kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, axis=1)
    rows = jnp.split(kernel, list(itertools.accumulate(p.shape[-1] for p in parts))[:-1])
    y = sum(dense(part, k, dtype=dtype) for part, k in zip(parts, rows, strict=True))
    stops = list(itertools.accumulate(k.shape[1] for k in kernels))
    outputs = jnp.split(y, stops[:-1], axis=-1)
    return [
        out if b is None else (out + jnp.broadcast_to(b, out.shape)).astype(dtype)
        for out, b in zip(outputs, biases, strict=True)
    ]


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
        y = grouped_dense(x, kernel, dtype=dtype)
        if self.use_bias:
            y = y + jnp.broadcast_to(self.param("bias", zeros, (F_out,)), y.shape)
        return y.astype(dtype)


def input_and_forget_gates(
    x: Float[Array, "B T F"] | Sequence[Float[Array, "B T F"]],
    num_heads: int,
    biases: tuple[Initializer, Initializer],
) -> list[Float[Array, "B T H"]]:
    """Pre-activations i and f of an mLSTM cell; at first x has no influence on them."""
    gate = functools.partial(Dense, num_heads, zeros, use_bias=True, wide=True)
    names = "input_gate", "forget_gate"
    layers = (gate(bias_init=b, name=name) for b, name in zip(biases, names, strict=True))
    return dense_together(x, *layers)


class Embedding(nn.Module):
    """The embedding of tokens; a tied model uses it as its head as well."""

    vocab_size: int
    dim: int
    embedding_init: Initializer

    @nn.compact
    def __call__(self) -> Float[Array, "vocab D"]:
        return self.param("embedding", self.embedding_init, (self.vocab_size, self.dim))
