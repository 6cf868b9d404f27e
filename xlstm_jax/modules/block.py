"""Residual blocks, and the letters they have in a pattern.

A block maps (x, state) to (x, state) and makes its own empty state: that is all the stack asks for.
Sources: arXiv:2405.04517, figures 10 and 11; arXiv:2503.13427, section 3.
"""

import flax.linen as nn
import jax.numpy as jnp

from xlstm_jax.cells import MLSTMState
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.feedforward import GatedFeedForward, LargeFeedForward
from xlstm_jax.modules.large import LargeMLSTMLayer
from xlstm_jax.modules.mlstm import MLSTMLayer, MLSTMLayerState
from xlstm_jax.modules.norm import LayerNorm, RMSNorm
from xlstm_jax.modules.slstm import SLSTMLayer, SLSTMLayerState
from xlstm_jax.typing import Array, Bool, Float, Int


class MLSTMBlock(nn.Module):
    """First generation: x + mLSTM(norm(x)); the projection up is inside the layer."""

    cfg: LMConfig
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MLSTMLayerState | None = None,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        block_index: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], MLSTMLayerState]:
        norm = LayerNorm(self.cfg.mlstm.norm_eps, name="xlstm_norm")
        y, state = self._layer(name="mlstm")(norm(x), state, reset=reset, mask=mask)
        return x + y, state

    @nn.nowrap
    def init_state(self, batch_size: int) -> MLSTMLayerState:
        """The empty memory."""
        layer = self._layer(parent=None)
        return layer.init_state(batch_size, self.cfg.dim, jnp.dtype(self.cfg.dtype))

    @nn.nowrap
    def _layer(self, **place) -> MLSTMLayer:
        cfg = self.cfg
        return MLSTMLayer(cfg.mlstm, cfg.num_blocks, cfg.dropout, self.deterministic, **place)


class SLSTMBlock(nn.Module):
    """First generation: x + sLSTM(norm(x)), then x + ffn(norm(x)) unless its width is 0."""

    cfg: LMConfig
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: SLSTMLayerState | None = None,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        block_index: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], SLSTMLayerState]:
        cfg = self.cfg.slstm
        y = LayerNorm(cfg.norm_eps, name="xlstm_norm")(x)
        layer = self._layer(name="slstm")
        y, state = layer(y, state, reset=reset, mask=mask, block_index=block_index)
        x = x + y
        if cfg.ffn_width(self.cfg.dim) == 0:
            return x, state
        ffn = GatedFeedForward(
            inner_dim=cfg.ffn_width(self.cfg.dim),
            num_blocks=self.cfg.num_blocks,
            activation=cfg.ffn_activation,
            use_bias=cfg.ffn_bias,
            dropout=cfg.ffn_dropout,
            deterministic=self.deterministic,
            name="ffn",
        )
        return x + ffn(LayerNorm(cfg.norm_eps, name="ffn_norm")(x)), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> SLSTMLayerState:
        """The empty memory."""
        layer = self._layer(parent=None)
        return layer.init_state(batch_size, self.cfg.dim, jnp.dtype(self.cfg.dtype))

    @nn.nowrap
    def _layer(self, **place) -> SLSTMLayer:
        cfg = self.cfg
        return SLSTMLayer(cfg.slstm, cfg.num_blocks, cfg.dropout, self.deterministic, **place)


class LargeBlock(nn.Module):
    """Large architecture: x + mLSTM(norm(x)), then x + ffn(norm(x)); no dropout."""

    cfg: LMConfig
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MLSTMState | None = None,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        block_index: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], MLSTMState]:
        cfg, num_blocks = self.cfg.large, self.cfg.num_blocks
        y = RMSNorm(cfg.norm_eps, cfg.use_bias, name="norm_mlstm")(x)
        layer = LargeMLSTMLayer(cfg, num_blocks, name="mlstm")
        y, state = layer(y, state, reset=reset, mask=mask)
        x = x + y
        _, _, ffn_dim = cfg.widths(self.cfg.dim)
        y = RMSNorm(cfg.norm_eps, cfg.use_bias, name="norm_ffn")(x)
        return x + LargeFeedForward(ffn_dim, num_blocks, cfg.use_bias, name="ffn")(y), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> MLSTMState:
        """The empty memory."""
        layer = LargeMLSTMLayer(self.cfg.large, self.cfg.num_blocks, parent=None)
        return layer.init_state(batch_size, self.cfg.dim)


BLOCKS = {"m": MLSTMBlock, "s": SLSTMBlock, "M": LargeBlock}
