"""The mLSTM layer of the first generation: up-projection, convolution, cell, gated skip.

Source: Beck et al. 2024, arXiv:2405.04517, figure 11 (pre-up-projection block).
"""

import dataclasses
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm_jax import ops
from xlstm_jax.cells import MLSTMState, mlstm_init
from xlstm_jax.modules.checks import check_at_least, check_choice, check_divides
from xlstm_jax.modules.conv import CausalConv, conv_state
from xlstm_jax.modules.feedforward import first_generation_width
from xlstm_jax.modules.initializers import linspace, normal, ones, small, wang, zeros
from xlstm_jax.modules.linear import Dense, HeadwiseDense
from xlstm_jax.modules.norm import MultiHeadNorm
from xlstm_jax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLSTMConfig:
    """Sizes and numerics of a first-generation mLSTM block (letter m)."""

    num_heads: int = 4  # H
    inner_dim: int | None = None  # I, of all heads; None: 2 * dim, rounded up to a multiple of 64
    qkv_block_size: int = 4  # q, k and v mix features in groups of this size
    conv_width: int = 4  # W; 0: no convolution
    use_bias: bool = False  # of the projections; gates and convolution always have theirs
    input_gate: Literal["exp", "sigmoid"] = "exp"
    normalize: bool = True  # False needs the sigmoid input gate
    input_bias_std: float = 0.1  # initial input-gate bias, normal around 0
    forget_bias: tuple[float, float] = (3.0, 6.0)  # first and last head: memories of many lengths
    eps: float = 1e-6  # added to the normaliser
    norm_eps: float = 1e-5
    chunk_size: int | None = None  # L; speed only, None lets the op choose
    implementation: str = "auto"  # of ops.mlstm

    def __post_init__(self):
        check_at_least("mlstm.conv_width", self.conv_width, 0)
        check_choice("mlstm.input_gate", self.input_gate, ("exp", "sigmoid"))
        check_cell("mlstm", self.normalize, self.input_gate, self.chunk_size)

    def width(self, dim: int) -> int:
        """I, the inner width in a model of width `dim`."""
        return first_generation_width(dim, 2.0) if self.inner_dim is None else self.inner_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError where heads or groups do not divide the inner width."""
        inner_dim = self.width(dim)
        check_at_least("mlstm.inner_dim", inner_dim, 1)
        check_divides("mlstm.num_heads", self.num_heads, "the inner width", inner_dim)
        check_divides("mlstm.qkv_block_size", self.qkv_block_size, "the inner width", inner_dim)


def check_cell(name: str, normalize: bool, input_gate: str, chunk_size: int | None) -> None:
    """Raises ConfigError for options that `ops.mlstm` would refuse."""
    if not normalize:
        # An exponential input gate without a normaliser grows without bound.
        check_choice(f"{name}.input_gate with normalize=False", input_gate, ("sigmoid",))
    if chunk_size is not None:
        check_at_least(f"{name}.chunk_size", chunk_size, 1)


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
        a, z = jnp.split(up, 2, axis=-1)
        u, conv = CausalConv(cfg.conv_width, name="conv")(a, conv, reset=reset, mask=mask)
        u = jax.nn.silu(u)
        q, k, v = (self._project(name, y, dim) for name, y in (("q", u), ("k", u), ("v", a)))
        i, f = self._gates(jnp.concatenate([q, k, v], axis=-1))
        h, cell = ops.mlstm(
            *(y.reshape(*y.shape[:2], cfg.num_heads, -1) for y in (q, k, v)),
            i,
            f,
            cell,
            reset=reset,
            mask=mask,
            input_gate=cfg.input_gate,
            normalize=cfg.normalize,
            eps=cfg.eps,
            chunk_size=cfg.chunk_size,
            implementation=cfg.implementation,
        )
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
        self, qkv: Float[Array, "B T F"]
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        biases = normal(self.cfg.input_bias_std), linspace(*self.cfg.forget_bias)
        names = "input_gate", "forget_gate"
        i, f = (
            Dense(self.cfg.num_heads, zeros, True, bias_init, wide=True, name=name)(qkv)
            for name, bias_init in zip(names, biases, strict=True)
        )
        return i, f

    @nn.nowrap
    def init_state(self, batch_size: int, dim: int, dtype: jnp.dtype) -> MLSTMLayerState:
        """The empty memory; `dtype` is that of activations."""
        inner_dim, H = self.cfg.width(dim), self.cfg.num_heads
        conv = conv_state(batch_size, self.cfg.conv_width, inner_dim, dtype)
        return MLSTMLayerState(conv, mlstm_init(batch_size, H, inner_dim // H, inner_dim // H))
