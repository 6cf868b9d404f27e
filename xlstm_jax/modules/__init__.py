"""Flax modules: layers, residual blocks and language models."""

from xlstm_jax.modules import presets
from xlstm_jax.modules.block import LargeBlock, MLSTMBlock, SLSTMBlock
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.conv import CausalConv
from xlstm_jax.modules.directions import BidirectionalBackbone, ScanBackbone
from xlstm_jax.modules.feedforward import GatedFeedForward, LargeFeedForward
from xlstm_jax.modules.heads import Classifier, PositionHead
from xlstm_jax.modules.kinds import BLOCKS, BlockKind
from xlstm_jax.modules.large import LargeMLSTMLayer
from xlstm_jax.modules.linear import Dense, Embedding, HeadwiseDense
from xlstm_jax.modules.lm import LM, Backbone, head_kernel, lm_logits, param_shapes
from xlstm_jax.modules.mlstm import MLSTMLayer, MLSTMLayerState
from xlstm_jax.modules.norm import LayerNorm, MultiHeadNorm, RMSNorm
from xlstm_jax.modules.options import LargeConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.modules.patterns import at, ratio_pattern
from xlstm_jax.modules.slstm import SLSTMLayer, SLSTMLayerState

__all__ = [
    "BLOCKS",
    "Backbone",
    "BidirectionalBackbone",
    "BlockKind",
    "CausalConv",
    "Classifier",
    "Dense",
    "Embedding",
    "GatedFeedForward",
    "HeadwiseDense",
    "LM",
    "LMConfig",
    "LargeBlock",
    "LargeConfig",
    "LargeFeedForward",
    "LargeMLSTMLayer",
    "LayerNorm",
    "MLSTMBlock",
    "MLSTMConfig",
    "MLSTMLayer",
    "MLSTMLayerState",
    "MultiHeadNorm",
    "PositionHead",
    "RMSNorm",
    "SLSTMBlock",
    "SLSTMConfig",
    "SLSTMLayer",
    "SLSTMLayerState",
    "ScanBackbone",
    "at",
    "head_kernel",
    "lm_logits",
    "param_shapes",
    "presets",
    "ratio_pattern",
]
