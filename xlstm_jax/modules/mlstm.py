"""First-generation mLSTM layer: up-projection, convolution, cell, gated skip.

Source: Beck et al. 2024, arXiv:2405.04517, figure 11 (pre-up-projection block).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax import ops
from xlstm_jax.cells import MLSTMState, mlstm_init
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.capture import sow_gates
from xlstm_jax.modules.checks import check_layer_state
from xlstm_jax.modules.conv import CausalConv, conv_state
from xlstm_jax.modules.initializers import linspace, normal, ones, small, wang
from xlstm_jax.modules.linear import Dense, HeadwiseDense, input_and_forget_gates
from xlstm_jax.modules.norm import MultiHeadNorm
from xlstm_jax.modules.options import MLSTMConfig
from xlstm_jax.ops.activations import silu, silu_gate
from xlstm_jax.ops.trace import mlstm_trace
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Flag, Float, Size


class MLSTMLayerState(NamedTuple):
    """Recurrent state of a first-generation mLSTM layer."""

    conv: Float[Array, "B ... F"]  # last W - 1 inputs of the convolution, oldest first
    cell: MLSTMState


export.register_namedtuple_serialization(
    MLSTMLayerState, serialized_name="xlstm_jax.MLSTMLayerState"
)


class MLSTMLayer(nn.Module):
    """y = down((norm(mLSTM) + skip * u) * silu(z)), with [a, z] = up(x) and u = silu(conv(a)).

    Queries and keys are projected from u, values from a, and the gates from (q, k, v).
    """

    cfg: MLSTMConfig
    num_blocks: int = 1  # of the model; scales down the initial output projection
    dropout: float = 0.0

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MLSTMLayerState | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], MLSTMLayerState]:
        cfg, dim = self.cfg, x.shape[-1]
        inner_dim = cfg.width(dim)
        check_layer_state(self, state, x)
        conv, cell = (None, None) if state is None else state
        up = Dense(2 * inner_dim, small(dim), cfg.use_bias, name="proj_up")(x)
        a, z = (constrain(y, "batch", "time", "inner") for y in jnp.split(up, 2, axis=-1))
        convolve = CausalConv(cfg.conv_width, cfg.conv_mixing, name="conv")
        u, conv = convolve(a, conv, reset=reset, mask=mask)
        u = silu(u)
        project = functools.partial(
            HeadwiseDense, inner_dim, inner_dim // cfg.qkv_block_size, small(dim), cfg.use_bias
        )
        q, k, v = (project(name=f"{name}_proj")(y) for name, y in (("q", u), ("k", u), ("v", a)))
        biases = normal(cfg.input_bias_std), linspace(*cfg.forget_bias)
        has_kernel = cfg.input_gate_kernel, cfg.forget_gate_kernel
        i, f = input_and_forget_gates((q, k, v), cfg.num_heads, biases, has_kernel)
        H, K = cfg.memory_shape(dim)
        if not cfg.covariance_update:
            # Every feature is a head of size 1, with the gates of its head and 1/sqrt(K) of it.
            size = inner_dim // cfg.num_heads
            i, f, q = jnp.repeat(i, size, -1), jnp.repeat(f, size, -1), q * size**-0.5
        q, k, v = (y.reshape(*y.shape[:2], H, K) for y in (q, k, v))
        flags: dict[str, Any] = dict(reset=reset, mask=mask)
        sow_gates(self, mlstm_trace, q, k, i, f, z, cell, **flags, **cfg.numerics)
        h, cell = ops.mlstm(q, k, v, i, f, cell, **flags, **cfg.cell)
        h = h.reshape(*h.shape[:2], cfg.num_heads, -1)
        h = MultiHeadNorm(cfg.norm_eps, as_offset=True, name="out_norm")(h)
        skip = self.param("learnable_skip", ones, (inner_dim,)).astype(x.dtype)
        y = silu_gate(z, h + skip[None, None] * u)
        y = Dense(dim, wang(dim, self.num_blocks), cfg.use_bias, name="proj_down")(y)
        y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
        return y, MLSTMLayerState(conv, cell)

    @nn.nowrap
    def init_state(
        self, batch_size: Size, dim: int, dtype: DTypeLike = jnp.float32
    ) -> MLSTMLayerState:
        """The initial state: zeros, in the dtype of activations; `cell` is float32 or wider."""
        conv = conv_state(batch_size, self.cfg.conv_width, self.cfg.width(dim), dtype)
        (H, K), cell_dtype = self.cfg.memory_shape(dim), jnp.promote_types(dtype, jnp.float32)
        return MLSTMLayerState(conv, mlstm_init(batch_size, H, K, K, cell_dtype))
