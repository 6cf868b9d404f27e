"""Residual blocks of the built-in kinds, and their records in `BLOCKS`.

Sources: arXiv:2405.04517, figures 10 and 11; arXiv:2503.13427, section 3.
"""

import flax.linen as nn
import jax.numpy as jnp

from xlstm_jax.cells import MLSTMState
from xlstm_jax.modules import counts
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.feedforward import GatedFeedForward, LargeFeedForward
from xlstm_jax.modules.kinds import BLOCKS, IMPLEMENTATIONS, BlockKind
from xlstm_jax.modules.large import LargeMLSTMLayer
from xlstm_jax.modules.mlstm import MLSTMLayer, MLSTMLayerState
from xlstm_jax.modules.norm import LayerNorm, RMSNorm
from xlstm_jax.modules.options import LargeConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.modules.slstm import SLSTMLayer, SLSTMLayerState
from xlstm_jax.ops.registry import TABLES
from xlstm_jax.sharding.axes import set_block_axes
from xlstm_jax.typing import Array, Bool, Float, Int

IMPLEMENTATIONS.update(TABLES)


class MLSTMBlock(nn.Module):
    """First generation: x + mLSTM(norm(x)); the up-projection is inside the layer."""

    cfg: LMConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MLSTMLayerState | None = None,
        *,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], MLSTMLayerState]:
        norm, layer = LayerNorm(self.cfg.mlstm.norm_eps, name="xlstm_norm"), self._layer("mlstm")
        y, state = layer(norm(x), state, reset=reset, mask=mask, deterministic=deterministic)
        return x + y, state

    @nn.nowrap
    def init_state(self, batch_size: int) -> MLSTMLayerState:
        """The initial state: zeros."""
        return self._layer(parent=None).init_state(
            batch_size, self.cfg.dim, jnp.dtype(self.cfg.dtype)
        )

    @nn.nowrap
    def _layer(self, name: str | None = None, **options) -> MLSTMLayer:
        cfg = self.cfg
        return MLSTMLayer(cfg.mlstm, cfg.num_blocks, cfg.dropout, name=name, **options)


class SLSTMBlock(nn.Module):
    """First generation: x + sLSTM(norm(x)), then x + ffn(norm(x)) unless its width is 0."""

    cfg: LMConfig
    block_index: int | Int[Array, ""] = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: SLSTMLayerState | None = None,
        *,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], SLSTMLayerState]:
        cfg, num_blocks = self.cfg.slstm, self.cfg.num_blocks
        norm, layer = LayerNorm(cfg.norm_eps, name="xlstm_norm"), self._layer("slstm")
        y, state = layer(norm(x), state, reset=reset, mask=mask, deterministic=deterministic)
        x, inner_dim = x + y, cfg.ffn_width(self.cfg.dim)
        if inner_dim == 0:
            return x, state
        y = LayerNorm(cfg.norm_eps, name="ffn_norm")(x)
        options = (cfg.ffn_activation, cfg.ffn_bias, cfg.ffn_dropout)
        ffn = GatedFeedForward(inner_dim, num_blocks, *options, name="ffn")
        return x + ffn(y, deterministic=deterministic), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> SLSTMLayerState:
        """The initial state: zeros."""
        return self._layer(parent=None).init_state(
            batch_size, self.cfg.dim, jnp.dtype(self.cfg.dtype)
        )

    @nn.nowrap
    def _layer(self, name: str | None = None, **options) -> SLSTMLayer:
        cfg = self.cfg
        fields = (cfg.slstm, cfg.num_blocks, cfg.dropout, self.block_index)
        return SLSTMLayer(*fields, name=name, **options)


class LargeBlock(nn.Module):
    """Large architecture: x + mLSTM(norm(x)), then x + ffn(norm(x)); no dropout."""

    cfg: LMConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MLSTMState | None = None,
        *,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], MLSTMState]:
        cfg, num_blocks = self.cfg.large, self.cfg.num_blocks
        y = RMSNorm(cfg.norm_eps, cfg.use_bias, name="norm_mlstm")(x)
        layer = LargeMLSTMLayer(cfg, num_blocks, name="mlstm")
        y, state = layer(y, state, reset=reset, mask=mask, deterministic=deterministic)
        x = x + y
        _, _, ffn_dim = cfg.widths(self.cfg.dim)
        y = RMSNorm(cfg.norm_eps, cfg.use_bias, name="norm_ffn")(x)
        return x + LargeFeedForward(ffn_dim, num_blocks, cfg.use_bias, name="ffn")(y), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> MLSTMState:
        """The initial state: zeros."""
        return LargeMLSTMLayer(self.cfg.large, parent=None).init_state(batch_size, self.cfg.dim)


BLOCKS["m"] = BlockKind(
    name="mlstm",
    options=MLSTMConfig,
    block=MLSTMBlock,
    axes={
        r"mlstm/proj_up/kernel": ("embed", "inner"),
        r"mlstm/proj_down/kernel": ("inner", "embed"),
        r"mlstm/[qkv]_proj/kernel": ("inner", None, None),  # small blocks on a diagonal
        r"mlstm/(proj_up|[qkv]_proj)/bias": ("inner",),
        r"mlstm/learnable_skip": ("inner",),
        # Its rows are those of q, k and v one after the other, which no shard respects; small.
        r"mlstm/(input|forget)_gate/kernel": (None, "heads"),
        r"mlstm/(input|forget)_gate/bias": (None,),
    },
    count_params=counts.mlstm_params,
    forward_flops=counts.mlstm_flops,
)
BLOCKS["s"] = BlockKind(
    name="slstm",
    options=SLSTMConfig,
    block=SLSTMBlock,
    axes={
        r"slstm/(input_gate|forget_gate|cell_input|output_gate)/kernel": ("heads", "embed", None),
        r"slstm/recurrent_kernel": ("heads", "embed", None, None),
        r"slstm/bias": ("heads", None, None),
    },
    count_params=counts.slstm_params,
    forward_flops=counts.slstm_flops,
)
BLOCKS["M"] = BlockKind(
    name="large",
    options=LargeConfig,
    block=LargeBlock,
    axes={
        r"mlstm/(q|k|v|output_gate)/kernel": ("embed", "inner"),
        r"mlstm/(q|k|v|output_gate)/bias": ("inner",),
        r"mlstm/(input|forget)_gate/kernel": ("embed", "heads"),
        r"mlstm/(input|forget)_gate/bias": (None,),
        r"mlstm/out_proj/kernel": ("inner", "embed"),
    },
    count_params=counts.large_params,
    forward_flops=counts.large_flops,
)

set_block_axes(lambda letter: BLOCKS[letter].axes if letter in BLOCKS else {})
