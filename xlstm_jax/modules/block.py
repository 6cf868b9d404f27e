"""Residual blocks of the built-in kinds, and their records in `BLOCKS`.

Sources: arXiv:2405.04517, figures 10 and 11; arXiv:2503.13427, section 3.
"""

from typing import Any

import flax.linen as nn

from xlstm_jax.modules import counts, inference
from xlstm_jax.modules.feedforward import FeedForward, GatedFeedForward, LargeFeedForward
from xlstm_jax.modules.kinds import BLOCKS, IMPLEMENTATIONS, BlockKind, Matrices
from xlstm_jax.modules.large import LargeMLSTMLayer
from xlstm_jax.modules.mlstm import MLSTMLayer
from xlstm_jax.modules.norm import LayerNorm, RMSNorm
from xlstm_jax.modules.options import LargeConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.modules.residual import ResidualBlock
from xlstm_jax.modules.slstm import SLSTMLayer
from xlstm_jax.ops.registry import TABLES
from xlstm_jax.sharding.axes import set_block_axes
from xlstm_jax.typing import Array, Int

# `options` checks names against this table without importing `ops`.
IMPLEMENTATIONS.update(TABLES)


class MLSTMBlock(ResidualBlock):
    """First generation: the up-projection is inside the layer; no feed-forward layer."""

    def _parts(self):
        return LayerNorm(self.cfg.mlstm.norm_eps, name="xlstm_norm"), self._layer(name="mlstm")

    @nn.nowrap
    def _layer(self, **options):
        return MLSTMLayer(self.cfg.mlstm, self.cfg.num_blocks, self.cfg.dropout, **options)


class SLSTMBlock(ResidualBlock):
    """First generation, with a feed-forward layer unless its width is 0."""

    block_index: int | Int[Array, ""] = 0  # in the model; traced, as blocks are initialized by vmap

    def _parts(self):
        cfg, inner_dim = self.cfg.slstm, self.cfg.slstm.ffn_width(self.cfg.dim)
        parts = LayerNorm(cfg.norm_eps, name="xlstm_norm"), self._layer(name="slstm")
        if inner_dim == 0:
            return parts
        options = (cfg.ffn_activation, cfg.ffn_bias, cfg.ffn_dropout)
        ffn = GatedFeedForward(inner_dim, self.cfg.num_blocks, *options, name="ffn")
        return *parts, LayerNorm(cfg.norm_eps, name="ffn_norm"), ffn

    @nn.nowrap
    def _layer(self, **options):
        cfg = self.cfg
        return SLSTMLayer(cfg.slstm, cfg.num_blocks, cfg.dropout, self.block_index, **options)


class LargeBlock(ResidualBlock):
    """Large architecture, with a feed-forward layer; no dropout."""

    def _parts(self):
        cfg, (_, _, ffn_dim) = self.cfg.large, self.cfg.large.widths(self.cfg.dim)
        sizes: dict[str, Any] = dict(num_blocks=self.cfg.num_blocks, use_bias=cfg.use_bias)
        if cfg.ffn_activation is None:
            ffn = LargeFeedForward(ffn_dim, **sizes, name="ffn")
        else:
            ffn = FeedForward(ffn_dim, activation=cfg.ffn_activation, **sizes, name="ffn")
        return (
            RMSNorm(cfg.norm_eps, cfg.use_bias, name="norm_mlstm"),
            self._layer(name="mlstm"),
            RMSNorm(cfg.norm_eps, cfg.use_bias, name="norm_ffn"),
            ffn,
        )

    @nn.nowrap
    def _layer(self, **options):
        return LargeMLSTMLayer(self.cfg.large, self.cfg.num_blocks, **options)


BLOCKS["m"] = BlockKind(
    name="mlstm",
    options=MLSTMConfig,
    block=MLSTMBlock,
    axes={
        r"mlstm/proj_up/kernel": ("embed", "inner"),
        r"mlstm/proj_down/kernel": ("inner", "embed"),
        r"mlstm/[qkv]_proj/kernel": ("inner", None, None),  # diagonal blocks
        r"mlstm/(proj_up|[qkv]_proj)/bias": ("inner",),
        r"mlstm/learnable_skip": ("inner",),
        # Replicated over inputs: its rows are q, k and v concatenated, so that equal shards would
        # cross their boundaries. It is small.
        r"mlstm/(input|forget)_gate/kernel": (None, "heads"),
        r"mlstm/(input|forget)_gate/bias": (None,),
    },
    count_params=counts.mlstm_params,
    forward_flops=counts.mlstm_flops,
    inference=inference.MLSTM,
    matrices={
        r"mlstm/proj_up/kernel": Matrices(parts=2),  # a and z
        r"mlstm/proj_down/kernel": Matrices(),
        r"mlstm/[qkv]_proj/kernel": Matrices("bio"),
        r"mlstm/((input|forget)_gate/kernel|learnable_skip)": None,
    },
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
    inference=inference.SLSTM,
    matrices={
        r"slstm/(input_gate|forget_gate|cell_input|output_gate)/kernel": Matrices("bio"),
        r"slstm/recurrent_kernel": Matrices("bibo"),  # one per head and gate
        r"ffn/proj_up/kernel": Matrices(parts=2),  # gate and up
    },
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
    inference=inference.LARGE,
    matrices={
        r"mlstm/(q|k|v|output_gate|out_proj)/kernel": Matrices(),
        r"mlstm/(input|forget)_gate/kernel": None,
        r"ffn/(proj_up|proj_up_gate)/kernel": Matrices(),
    },
)

# The records of the baselines, in a module of their own.
import xlstm_jax.modules.baselines.records  # noqa: E402, F401

# A callback, so that `sharding` sees kinds registered later and does not import `modules`.
set_block_axes(lambda letter: BLOCKS[letter].axes if letter in BLOCKS else {})
