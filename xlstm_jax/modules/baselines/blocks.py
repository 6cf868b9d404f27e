"""Residual blocks of the baselines."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.baselines.attention import AttentionLayer
from xlstm_jax.modules.baselines.gated_delta import GatedDeltaLayer
from xlstm_jax.modules.baselines.hybrid import HybridLayer
from xlstm_jax.modules.baselines.lstm import LSTMLayer
from xlstm_jax.modules.baselines.mamba import MambaLayer
from xlstm_jax.modules.baselines.mamba2 import Mamba2Layer
from xlstm_jax.modules.baselines.options import AttentionConfig
from xlstm_jax.modules.baselines.rwkv4 import ChannelMix, TimeMix, TimeMixState
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.conv import conv_state
from xlstm_jax.modules.feedforward import FeedForward, LargeFeedForward
from xlstm_jax.modules.norm import LayerNorm, RMSNorm
from xlstm_jax.modules.residual import ResidualBlock
from xlstm_jax.typing import Array, Flag, Float, Int, Size


class LSTMStackBlock(ResidualBlock):
    """One layer of a plain stack of LSTMs: no residual connection, no norm."""

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Any = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Any]:
        flags: dict[str, Any] = dict(reset=reset, mask=mask, deterministic=deterministic)
        return self._layer(name="lstm")(x, state, **flags)

    @nn.nowrap
    def _layer(self, **options):
        return LSTMLayer(self.cfg.lstm, self.cfg.num_blocks, self.cfg.dropout, **options)


class LSTMBlock(ResidualBlock):
    """A Transformer block with an LSTM instead of attention, or only its residual LSTM."""

    def _parts(self):
        cfg, width = self.cfg.lstm, self.cfg.lstm.ffn_width(self.cfg.dim)
        parts = (
            LayerNorm(cfg.norm_eps, as_offset=False, name="norm_lstm"),
            self._layer(name="lstm"),
        )
        if width == 0:
            return parts
        ffn = FeedForward(width, self.cfg.num_blocks, cfg.ffn_activation, name="ffn")
        return *parts, LayerNorm(cfg.norm_eps, as_offset=False, name="norm_ffn"), ffn

    @nn.nowrap
    def _layer(self, **options):
        return LSTMLayer(self.cfg.lstm, self.cfg.num_blocks, self.cfg.dropout, **options)


class AttentionBlock(ResidualBlock):
    """A Llama block: rotary attention and a gated feed-forward layer."""

    @property
    def options(self) -> AttentionConfig:
        """The options of the attention layer."""
        return self.cfg.attention

    def _parts(self):
        cfg = self.options
        return (
            RMSNorm(cfg.norm_eps, as_offset=cfg.norm_offset, name="norm_attention"),
            self._layer(name="attention"),
            RMSNorm(cfg.norm_eps, as_offset=cfg.norm_offset, name="norm_ffn"),
            LargeFeedForward(cfg.ffn_width(self.cfg.dim), self.cfg.num_blocks, name="ffn"),
        )

    @nn.nowrap
    def _layer(self, **options):
        return AttentionLayer(self.options, self.cfg.num_blocks, self.cfg.dropout, **options)


class WindowBlock(AttentionBlock):
    """An attention block that sees a sliding window and sink tokens."""

    @property
    def options(self) -> AttentionConfig:
        """The options of the attention layer."""
        return self.cfg.window


class HybridBlock(ResidualBlock):
    """mLSTM and window over the same queries, keys and values, and a gated feed-forward layer."""

    def _parts(self):
        cfg = self.cfg.hybrid
        return (
            RMSNorm(cfg.norm_eps, name="norm_mixer"),
            self._layer(name="hybrid"),
            RMSNorm(cfg.norm_eps, name="norm_ffn"),
            LargeFeedForward(cfg.ffn_width(self.cfg.dim), self.cfg.num_blocks, name="ffn"),
        )

    @nn.nowrap
    def _layer(self, **options):
        return HybridLayer(self.cfg.hybrid, self.cfg.num_blocks, self.cfg.dropout, **options)


class MambaBlock(ResidualBlock):
    """Mamba, without a feed-forward layer."""

    def _parts(self):
        return RMSNorm(self.cfg.mamba.norm_eps, name="norm"), self._layer(name="mamba")

    @nn.nowrap
    def _layer(self, **options):
        return MambaLayer(self.cfg.mamba, self.cfg.num_blocks, self.cfg.dropout, **options)


class Mamba2Block(ResidualBlock):
    """Mamba-2, without a feed-forward layer."""

    def _parts(self):
        return RMSNorm(self.cfg.mamba2.norm_eps, name="norm"), self._layer(name="mamba2")

    @nn.nowrap
    def _layer(self, **options):
        return Mamba2Layer(self.cfg.mamba2, self.cfg.num_blocks, self.cfg.dropout, **options)


class GatedDeltaBlock(ResidualBlock):
    """Gated delta net, and a gated feed-forward layer."""

    def _parts(self):
        cfg = self.cfg.gated_delta
        return (
            RMSNorm(cfg.norm_eps, as_offset=cfg.norm_offset, name="norm_mixer"),
            self._layer(name="gated_delta"),
            RMSNorm(cfg.norm_eps, as_offset=cfg.norm_offset, name="norm_ffn"),
            LargeFeedForward(cfg.ffn_width(self.cfg.dim), self.cfg.num_blocks, name="ffn"),
        )

    @nn.nowrap
    def _layer(self, **options):
        cfg = self.cfg
        return GatedDeltaLayer(cfg.gated_delta, cfg.num_blocks, cfg.dropout, **options)


class RWKV4State(NamedTuple):
    """Recurrent state of an RWKV-4 block."""

    time: TimeMixState
    channel: Float[Array, "B 1 D"]  # last input of the channel mixing layer


export.register_namedtuple_serialization(RWKV4State, serialized_name="xlstm_jax.RWKV4State")


class RWKV4Block(nn.Module):
    """Time mixing, then channel mixing, both residual and with a layer norm before."""

    cfg: LMConfig
    block_index: int | Int[Array, ""] = 0  # in the model; traced, as blocks are initialized by vmap

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: RWKV4State | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], RWKV4State]:
        cfg, states = self.cfg, []
        flags: dict[str, Any] = dict(reset=reset, mask=mask)
        layers = {"time": TimeMix, "channel": ChannelMix}
        for n, (name, cls) in enumerate(layers.items()):
            norm = LayerNorm(cfg.rwkv4.norm_eps, True, as_offset=False, name=f"norm_{name}")
            layer = cls(cfg.rwkv4, cfg.num_blocks, self.block_index, name=f"{name}_mix")
            y, last = layer(norm(x), None if state is None else state[n], **flags)
            x = x + nn.Dropout(cfg.dropout, deterministic=deterministic)(y)
            states.append(last)
        return x, RWKV4State(*states)

    @nn.nowrap
    def init_state(self, batch_size: Size, dtype: DTypeLike | None = None) -> RWKV4State:
        """The initial state, zeros, for activations of `dtype`; None: `cfg.dtype`."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype if dtype is None else dtype)
        time = TimeMix(cfg.rwkv4, parent=None).init_state(batch_size, cfg.dim, dtype)
        return RWKV4State(time, conv_state(batch_size, 2, cfg.dim, dtype))
