"""The mLSTM layer of the first generation: up-projection, convolution, cell, gated skip.

Source: Beck et al. 2024, arXiv:2405.04517, figure 11 (pre-up-projection block).
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm_jax.cells import MLSTMState
from xlstm_jax.modules.cell import CellConfig
from xlstm_jax.modules.checks import check_at_least, check_divides
from xlstm_jax.modules.conv import CausalConv, conv_state
from xlstm_jax.modules.feedforward import first_generation_width
from xlstm_jax.modules.initializers import linspace, normal, ones, small, wang, zeros
from xlstm_jax.modules.linear import Dense, HeadwiseDense, dense_together
from xlstm_jax.modules.norm import MultiHeadNorm
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLSTMConfig(CellConfig):
    """Sizes and numerics of a first-generation mLSTM block (letter m)."""

    FIELD = "mlstm"

    inner_dim: int | None = None  # F, of all heads; None: 2 * dim, rounded up to a multiple of 64
    qkv_block_size: int = 4  # q, k and v mix features in groups of this size
    conv_width: int = 4  # W; 0: no convolution
    conv_mixing: bool = False  # the convolution mixes features; else each has its own window
    use_bias: bool = False  # of the projections; gates and convolution always have theirs
    input_bias_std: float = 0.1  # initial input-gate bias, normal around 0
    norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        check_at_least("mlstm.conv_width", self.conv_width, 0)

    def width(self, dim: int) -> int:
        """F, the inner width in a model of width `dim`."""
        return first_generation_width(dim, 2.0) if self.inner_dim is None else self.inner_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError where heads or groups do not divide the inner width."""
        inner_dim = self.width(dim)
        check_at_least("mlstm.inner_dim", inner_dim, 1)
        check_divides("mlstm.num_heads", self.num_heads, "the inner width", inner_dim)
        check_divides("mlstm.qkv_block_size", self.qkv_block_size, "the inner width", inner_dim)


class MLSTMLayerState(NamedTuple):
    """What a first-generation mLSTM layer carries through time."""

    conv: Float[Array, "B ... F"]  # last W - 1 inputs of the convolution
    cell: MLSTMState


class MLSTMLayer(nn.Module):
    """y = down((norm(mLSTM) + skip * u) * silu(z)), with [a, z] = up(x) and u = silu(conv(a)).

    Queries and keys read u, values read a, the gates read all three.
    """

    cfg: MLSTMConfig
    num_blocks: int  # of the model: deeper models start with smaller outputs
    dropout: float = 0.0
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MLSTMLayerState | None = None,
        *,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MLSTMLayerState]:
        cfg, dim = self.cfg, x.shape[-1]
        inner_dim = cfg.width(dim)
        conv, cell = (None, None) if state is None else state
        up = Dense(2 * inner_dim, small(dim), cfg.use_bias, name="proj_up")(x)
        a, z = (constrain(y, "batch", "time", "inner") for y in jnp.split(up, 2, axis=-1))
        u, conv = CausalConv(cfg.conv_width, cfg.conv_mixing, name="conv")(
            a, conv, reset=reset, mask=mask
        )
        u = jax.nn.silu(u)
        q, k, v = (self._project(name, y, dim) for name, y in (("q", u), ("k", u), ("v", a)))
        i, f = self._gates(q, k, v)
        h, cell = cfg.run(q, k, v, i, f, cell, reset=reset, mask=mask)
        h = MultiHeadNorm(cfg.norm_eps, as_offset=True, name="out_norm")(h)
        skip = self.param("learnable_skip", ones, (inner_dim,)).astype(x.dtype)
        y = (h + skip[None, None] * u) * jax.nn.silu(z)
        y = Dense(dim, wang(dim, self.num_blocks), cfg.use_bias, name="proj_down")(y)
        y = nn.Dropout(self.dropout, deterministic=self.deterministic)(y)
        return y, MLSTMLayerState(conv, cell)

    def _project(self, name: str, x: Float[Array, "B T F"], dim: int) -> Float[Array, "B T F"]:
        groups = x.shape[-1] // self.cfg.qkv_block_size
        name = f"{name}_proj"
        return HeadwiseDense(x.shape[-1], groups, small(dim), self.cfg.use_bias, name=name)(x)

    def _gates(
        self,
        q: Float[Array, "B T F"],
        k: Float[Array, "B T F"],
        v: Float[Array, "B T F"],
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        biases = normal(self.cfg.input_bias_std), linspace(*self.cfg.forget_bias)
        names = "input_gate", "forget_gate"
        layers = (
            Dense(self.cfg.num_heads, zeros, True, bias_init, wide=True, name=name)
            for name, bias_init in zip(names, biases, strict=True)
        )
        i, f = dense_together((q, k, v), *layers)
        return i, f

    @nn.nowrap
    def init_state(self, batch_size: int, dim: int, dtype: jnp.dtype) -> MLSTMLayerState:
        """The empty memory; `dtype` is that of activations."""
        inner_dim = self.cfg.width(dim)
        conv = conv_state(batch_size, self.cfg.conv_width, inner_dim, dtype)
        return MLSTMLayerState(conv, self.cfg.empty(batch_size, inner_dim, inner_dim))
