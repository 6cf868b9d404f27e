"""Attention as a layer: the mixer of a Llama block, and of Qwen3-Next with its options.

Sources: Touvron et al. 2023, arXiv:2302.13971; norms of queries and keys, and the output gate: Qwen
team 2025, Qwen3-Next.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from xlstm_jax import ops
from xlstm_jax.cells.attention import AttentionState, Rotary, attention_init
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.baselines.options import AttentionConfig
from xlstm_jax.modules.checks import check_layer_state
from xlstm_jax.modules.initializers import small, wang
from xlstm_jax.modules.linear import Dense, fused_dense
from xlstm_jax.modules.norm import RMSNorm
from xlstm_jax.ops.activations import sigmoid_gate
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Flag, Float, Size


class AttentionLayer(nn.Module):
    """y = out(attention(q, k, v)), with q, k, v projected from x and rotated by their positions."""

    cfg: AttentionConfig
    num_blocks: int = 1  # of the model; scales down the initial output projection
    dropout: float = 0.0

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: AttentionState | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        cfg, dim = self.cfg, x.shape[-1]
        check_layer_state(self, state, x)
        K, groups = cfg.head_width(dim), cfg.kv_heads
        widths = {"q": cfg.num_heads * K, "k": groups * K, "v": groups * K}
        if cfg.output_gate:
            widths["output_gate"] = cfg.num_heads * K
        layers = [Dense(width, small(dim), cfg.use_bias, name=n) for n, width in widths.items()]
        q, k, v, *gate = (constrain(y, "batch", "time", "inner") for y in fused_dense(x, *layers))
        q, k, v = (y.reshape(*y.shape[:2], -1, K) for y in (q, k, v))
        if cfg.qk_norm:
            q = RMSNorm(cfg.norm_eps, as_offset=cfg.norm_offset, name="q_norm")(q)
            k = RMSNorm(cfg.norm_eps, as_offset=cfg.norm_offset, name="k_norm")(k)
        y, state = ops.attention(
            q,
            k,
            v,
            state,
            reset=reset,
            mask=mask,
            window=cfg.window_size,
            num_sinks=cfg.num_sinks,
            rotary=rotary_of(cfg.rotary_base, cfg.rotary_dim(dim)),
            implementation=cfg.implementation,
        )
        y = y.reshape(*y.shape[:2], -1)
        if gate:
            y = sigmoid_gate(gate[0], y)
        y = Dense(dim, wang(dim, self.num_blocks), cfg.use_bias, name="out_proj")(y)
        return nn.Dropout(self.dropout, deterministic=deterministic)(y), state

    @nn.nowrap
    def init_state(
        self, batch_size: Size, dim: int, dtype: DTypeLike = jnp.float32
    ) -> AttentionState:
        """The initial state: a cache of zeros in the dtype of activations."""
        cfg, K = self.cfg, self.cfg.head_width(dim)
        return attention_init(
            batch_size, cfg.num_sinks + cfg.window_size, cfg.kv_heads, K, K, dtype
        )


def rotary_of(base: float, dim: int) -> Rotary:
    """The rotation of the first `dim` features of a head; 0: none."""
    return Rotary(base, dim) if dim else Rotary(0.0)
