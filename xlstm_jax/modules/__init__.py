"""Parameters: layers, blocks and language models in Flax."""

from xlstm_jax.modules import presets
from xlstm_jax.modules.block import BLOCKS
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.large import LargeConfig
from xlstm_jax.modules.lm import LM, Backbone, head_kernel, param_shapes
from xlstm_jax.modules.mlstm import MLSTMConfig
from xlstm_jax.modules.patterns import at, ratio_pattern
from xlstm_jax.modules.slstm import SLSTMConfig

__all__ = [
    "BLOCKS",
    "Backbone",
    "LM",
    "LMConfig",
    "LargeConfig",
    "MLSTMConfig",
    "SLSTMConfig",
    "at",
    "head_kernel",
    "param_shapes",
    "presets",
    "ratio_pattern",
]
