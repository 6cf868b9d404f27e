"""Linear layers: dense, block-diagonal (head-wise), and the token embedding.

They compute in the dtype of their input; parameters are float32 and cast at use. For decoding, the
kernels of layers with the same input may be stored joined: see `joined_name`.
"""

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from xlstm_jax.cells.logspace import common_dtype, state_dtype
from xlstm_jax.modules.initializers import Initializer, zeros
from xlstm_jax.ops.dense import dense, grouped_dense
from xlstm_jax.ops.int8 import Int8Kernel
from xlstm_jax.sharding import is_sharded
from xlstm_jax.typing import Array, Float


class Dense(nn.Module):
    """y = x kernel (+ bias).

    With `upcast` the output has the dtype of the accumulator, float32 or wider, instead of x's, so
    that gate pre-activations and logits are not rounded to bfloat16.
    """

    features: int
    kernel_init: Initializer
    use_bias: bool = False
    bias_init: Initializer = zeros
    upcast: bool = False

    @nn.compact
    def weights(
        self, in_dim: int
    ) -> tuple[Float[Array, "F_in F_out"] | Int8Kernel, Float[Array, "F_out"] | None]:
        """The parameters: kernel, and bias or None."""
        kernel = self.get_variable("params", "kernel")
        if not isinstance(kernel, Int8Kernel):
            kernel = self.param("kernel", self.kernel_init, (in_dim, self.features))
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        return kernel, bias

    def __call__(self, x: Float[Array, "*batch F_in"]) -> Float[Array, "*batch F_out"]:
        return fused_dense(x, self)[0]


_joins: contextvars.ContextVar[list[tuple[str, ...]] | None] = contextvars.ContextVar(
    "joins", default=None
)


@contextlib.contextmanager
def recorded_joins() -> Iterator[list[tuple[str, ...]]]:
    """Within the context, the list gets the paths of layers that share a product, once per call."""
    token = _joins.set(joins := [])
    try:
        yield joins
    finally:
        _joins.reset(token)


def joined_name(names: Sequence[str]) -> str:
    """Name of a layer that stands for several with the same input, their outputs concatenated."""
    return "+".join(names)


def fused_dense(
    x: Float[Array, "*batch F_in"] | Sequence[Float[Array, "*batch F"]], *layers: Dense
) -> list[Array]:
    """Outputs of several layers for the same x, by one product with the concatenated kernels.

    One product is faster than several, forward and backward; each layer owns its parameters, or one
    named by `joined_name` has those of all. If output features are sharded, each layer has its own
    product. All layers must have the same `upcast`. A sequence of arrays x stands for their
    concatenation along features.
    """
    if len(layers) > 1:
        owner: Any = layers[0].parent
        widths = [layer.features for layer in layers]
        name = joined_name([str(layer.name) for layer in layers])
        if owner.has_variable("params", name):
            use_bias = any(layer.use_bias for layer in layers)
            joined = Dense(sum(widths), zeros, use_bias, upcast=layers[0].upcast, name=name)
            return jnp.split(fused_dense(x, joined)[0], np.cumsum(widths)[:-1], axis=-1)
        if is_sharded("inner"):
            # A shard of the concatenated kernel would not consist of shards of the kernels.
            return [y for layer in layers for y in fused_dense(x, layer)]
        if (joins := _joins.get()) is not None:
            joins.append(tuple("/".join(layer.path) for layer in layers))
    parts = x if isinstance(x, Sequence) else (x,)
    dtype = parts[0].dtype
    upcast = any(layer.upcast for layer in layers)
    dtype = state_dtype(parts[0]) if upcast else dtype
    in_dim = sum(part.shape[-1] for part in parts)
    kernels, biases = zip(*(layer.weights(in_dim) for layer in layers), strict=True)
    kernel: Any = kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, axis=1)
    # Products of the parts are summed: the input is not concatenated, which would copy it.
    in_stops = list(itertools.accumulate(part.shape[-1] for part in parts))
    blocks = [kernel] if len(parts) == 1 else jnp.split(kernel, in_stops[:-1])
    y = sum(dense(part, block, dtype=dtype) for part, block in zip(parts, blocks, strict=True))
    out_stops = list(itertools.accumulate(k.shape[1] for k in kernels))
    outputs = jnp.split(y, out_stops[:-1], axis=-1)
    return [
        out if b is None else _add_bias(out, b).astype(dtype)
        for out, b in zip(outputs, biases, strict=True)
    ]


def _add_bias(y: Float[Array, "*batch F"], bias: Float[Array, "F"]) -> Float[Array, "*batch F"]:
    dtype = common_dtype(y.dtype, bias.dtype)  # that of the parameter, usually float32
    return y.astype(dtype) + jnp.broadcast_to(bias.astype(dtype), y.shape)


class HeadwiseDense(nn.Module):
    """A dense layer within each of P equal groups of features (a block-diagonal kernel).

    The kernel has the shape (P, F_in / P, F_out / P). `upcast` as in `Dense`.
    """

    features: int
    num_groups: int  # P
    kernel_init: Initializer
    use_bias: bool = False
    upcast: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch F_in"]) -> Float[Array, "*batch F_out"]:
        P, F_in, F_out = self.num_groups, x.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, (P, F_in // P, F_out // P))
        dtype = state_dtype(x) if self.upcast else x.dtype
        y = grouped_dense(x, kernel, dtype=dtype)
        if self.use_bias:
            y = _add_bias(y, self.param("bias", zeros, (F_out,)))
        return y.astype(dtype)


class Bias(nn.Module):
    """y = bias at every position, like a `Dense` with `upcast` whose kernel is zero."""

    features: int
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "*batch F_in"]) -> Float[Array, "*batch F_out"]:
        bias = self.param("bias", self.bias_init, (self.features,))
        return _add_bias(jnp.zeros((*x.shape[:-1], self.features), state_dtype(x)), bias)


def input_and_forget_gates(
    x: Float[Array, "B T F"] | Sequence[Float[Array, "B T F"]],
    num_heads: int,
    biases: tuple[Initializer, Initializer],
    has_kernel: tuple[bool, bool] = (True, True),
) -> list[Float[Array, "B T H"]]:
    """Gate pre-activations i and f of an mLSTM cell; one without a kernel is only a bias.

    Kernels are initialized to zeros: before training the gates depend only on their biases.
    """
    gate = functools.partial(Dense, num_heads, zeros, use_bias=True, upcast=True)
    gates = list(zip(("input_gate", "forget_gate"), biases, has_kernel, strict=True))
    layers = [gate(bias_init=bias, name=name) for name, bias, has in gates if has]
    results = fused_dense(x, *layers) if layers else []
    outputs = dict(zip((layer.name for layer in layers), results, strict=True))
    like = x[0] if isinstance(x, Sequence) else x
    for name, bias, has in gates:
        if not has:
            outputs[name] = Bias(num_heads, bias, name=name)(like)
    return [outputs[name] for name, _, _ in gates]


class Embedding(nn.Module):
    """The token embedding matrix; a tied model also uses it as its head."""

    vocab_size: int
    dim: int
    embedding_init: Initializer

    @nn.compact
    def __call__(self) -> Float[Array, "vocab D"]:
        return self.param("embedding", self.embedding_init, (self.vocab_size, self.dim))
