"""The sLSTM layer of the first generation: convolution before two gates, cell, norm of each head.

Source: Beck et al. 2024, arXiv:2405.04517, figure 10 (post-up-projection block).
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm_jax import ops
from xlstm_jax.cells import SLSTMState, slstm_init
from xlstm_jax.modules.checks import check_at_least, check_choice, check_divides, check_rate
from xlstm_jax.modules.conv import CausalConv, conv_state
from xlstm_jax.modules.feedforward import ACTIVATIONS, first_generation_width
from xlstm_jax.modules.initializers import Initializer, linspace, small, uniform, zeros
from xlstm_jax.modules.linear import HeadwiseDense
from xlstm_jax.modules.norm import MultiHeadNorm
from xlstm_jax.ops.registry import TABLES
from xlstm_jax.typing import Array, Bool, Float, Int, PRNGKeyArray

RecurrentInit = Literal["zeros", "standard"]
BiasInit = Literal["powerlaw_blockdependent", "small_init", "standard", "zeros"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLSTMConfig:
    """Sizes and numerics of a first-generation sLSTM block (letter s), feed-forward included."""

    num_heads: int = 4  # H; memories mix inside a head
    conv_width: int = 4  # W; 0: neither convolution nor its activation
    conv_mixing: bool = False  # the convolution mixes features; else each has its own window
    forget_gate: Literal["sigmoid", "exp"] = "sigmoid"
    recurrent_init: RecurrentInit = "zeros"
    bias_init: BiasInit = "powerlaw_blockdependent"
    group_norm_weight: bool = True  # the norm after the cell has a scale
    norm_eps: float = 1e-5
    ffn_dim: int | None = None  # None: 1.3 * dim, rounded up to a multiple of 64; 0: none
    ffn_activation: str = "gelu"
    ffn_bias: bool = False
    ffn_dropout: float = 0.0  # of its own: the model's dropout does not reach the feed-forward
    implementation: str = "auto"  # of ops.slstm

    def __post_init__(self):
        check_at_least("slstm.conv_width", self.conv_width, 0)
        check_choice("slstm.forget_gate", self.forget_gate, ("sigmoid", "exp"))
        check_choice("slstm.recurrent_init", self.recurrent_init, get_args(RecurrentInit))
        check_choice("slstm.bias_init", self.bias_init, get_args(BiasInit))
        check_choice("slstm.implementation", self.implementation, ("auto", *TABLES["slstm"]))
        check_choice("slstm.ffn_activation", self.ffn_activation, ACTIVATIONS)
        check_rate("slstm.ffn_dropout", self.ffn_dropout)

    def ffn_width(self, dim: int) -> int:
        """Width of the feed-forward layer in a model of width `dim`; 0 where there is none."""
        return first_generation_width(dim, 1.3) if self.ffn_dim is None else self.ffn_dim

    def check(self, dim: int) -> None:
        """Raises ConfigError where heads do not divide the width."""
        check_at_least("slstm.ffn_dim", self.ffn_width(dim), 0)
        check_divides("slstm.num_heads", self.num_heads, "dim", dim)


class SLSTMLayerState(NamedTuple):
    """What a first-generation sLSTM layer carries through time."""

    conv: Float[Array, "B ... F"]  # last W - 1 inputs of the convolution
    cell: SLSTMState


class SLSTMLayer(nn.Module):
    """norm(sLSTM(i, f, z, o)): i and f read silu(conv(x)), z and o read x; no projection out."""

    cfg: SLSTMConfig
    num_blocks: int
    dropout: float = 0.0
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: SLSTMLayerState | None = None,
        *,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        block_index: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], SLSTMLayerState]:
        """`block_index` is the place in the model; only the initial forget bias depends on it."""
        cfg, (B, T, D) = self.cfg, x.shape
        H, K = cfg.num_heads, D // cfg.num_heads
        conv, cell = (None, None) if state is None else state
        u, conv = CausalConv(cfg.conv_width, cfg.conv_mixing, name="conv")(
            x, conv, reset=reset, mask=mask
        )
        u = u if cfg.conv_width == 0 else jax.nn.silu(u)
        gates = [
            HeadwiseDense(D, H, small(D), wide=True, name=name)(y).reshape(B, T, H, K)
            for name, y in (
                ("input_gate", u),
                ("forget_gate", u),
                ("cell_input", x),
                ("output_gate", x),
            )
        ]
        bias_init = cell_bias_init(cfg.bias_init, block_index, self.num_blocks)
        h, cell = ops.slstm(
            jnp.stack(gates, axis=2),
            self.param("recurrent_kernel", recurrent_init(cfg.recurrent_init), (H, K, 4, K)),
            self.param("bias", bias_init, (H, 4, K)),
            cell,
            reset=reset,
            mask=mask,
            forget_gate=cfg.forget_gate,
            implementation=cfg.implementation,
        )
        h = nn.Dropout(self.dropout, deterministic=self.deterministic)(h)
        norm = MultiHeadNorm(
            cfg.norm_eps, as_offset=True, use_scale=cfg.group_norm_weight, name="group_norm"
        )
        return norm(h).astype(x.dtype), SLSTMLayerState(conv, cell)

    @nn.nowrap
    def init_state(self, batch_size: int, dim: int, dtype: jnp.dtype) -> SLSTMLayerState:
        """The empty memory; `dtype` is that of activations."""
        conv = conv_state(batch_size, self.cfg.conv_width, dim, dtype)
        H = self.cfg.num_heads
        return SLSTMLayerState(conv, slstm_init(batch_size, H, dim // H))


def recurrent_init(name: RecurrentInit) -> Initializer:
    """Of the recurrent weights (H, K, 4, K)."""
    if name == "zeros":
        return zeros
    return lambda key, shape: uniform(1 / math.sqrt(shape[0] * shape[1]))(key, shape)


def cell_bias_init(
    name: BiasInit, block_index: int | Int[Array, ""], num_blocks: int
) -> Initializer:
    """Of the bias (H, 4, K) of the four gates; all but "standard" set the forget gate alone."""
    if name == "zeros":
        return zeros
    if name == "standard":
        return lambda key, shape: uniform(1 / math.sqrt(shape[0] * shape[2]))(key, shape)
    depth = block_index / (num_blocks - 1) if num_blocks > 1 else 0.0
    forget = linspace(3.0, 6.0) if name == "small_init" else _powerlaw(0.3 + 1.3 * depth)

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "H 4 K"]:
        H, _, K = shape
        return jnp.zeros(shape, jnp.float32).at[:, 1].set(forget(key, (H, K)))

    return init


def _powerlaw(exponent: float | Float[Array, ""]) -> Initializer:
    """From 5 down to -7 along a head, bent by the exponent; a head of width 1 has 5."""

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "H K"]:
        share = jnp.linspace(0.0, 1.0, shape[-1], dtype=jnp.float32)
        return jnp.broadcast_to(5.0 - 12.0 * share ** jnp.asarray(exponent, jnp.float32), shape)

    return init
