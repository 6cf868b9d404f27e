"""mLSTM and a sliding window over the same queries, keys and values, mixed by a gate.

The mLSTM carries the entire document in its state; attention reads the window and sinks exactly.
Source: the hybrid of Hauzenberger et al. 2026, arXiv:2603.15590; widths and norms are those of the
large mLSTM block.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax import ops
from xlstm_jax.cells import MLSTMState, mlstm_init
from xlstm_jax.cells.attention import AttentionState, Rotary, attention_init
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.baselines.options import HybridConfig
from xlstm_jax.modules.capture import sow_gates
from xlstm_jax.modules.checks import check_layer_state
from xlstm_jax.modules.initializers import constant, linspace, small, wang, zeros
from xlstm_jax.modules.linear import Dense, fused_dense, input_and_forget_gates
from xlstm_jax.modules.norm import MultiHeadNorm
from xlstm_jax.ops.trace import mlstm_trace
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Flag, Float, Size


class HybridState(NamedTuple):
    """Recurrent state of a hybrid layer."""

    cell: MLSTMState
    window: AttentionState


export.register_namedtuple_serialization(HybridState, serialized_name="xlstm_jax.HybridState")


class HybridLayer(nn.Module):
    """y = out(g * norm(mLSTM(q, k, v)) + (1 - g) * window(q, k, v)), with g = sigmoid(gate(x))."""

    cfg: HybridConfig
    num_blocks: int = 1  # of the model; scales down the initial output projection
    dropout: float = 0.0

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: HybridState | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], HybridState]:
        cfg, dim = self.cfg, x.shape[-1]
        check_layer_state(self, state, x)
        cell, window = (None, None) if state is None else state
        layers = [Dense(dim, small(dim), name=name) for name in ("q", "k", "v")]
        # Zeros: both parts start with the weight 0.5 for every input.
        layers.append(Dense(dim, zeros, name="output_gate"))
        q, k, v, gate = (constrain(y, "batch", "time", "inner") for y in fused_dense(x, *layers))
        biases = constant(cfg.input_bias), linspace(*cfg.forget_bias)
        gates = input_and_forget_gates(x, cfg.num_heads, biases)
        i, f = (ops.soft_cap(gate, cfg.gate_soft_cap) for gate in gates)
        q, k, v = (y.reshape(*y.shape[:2], cfg.num_heads, -1) for y in (q, k, v))
        flags: dict[str, Any] = dict(reset=reset, mask=mask)
        sow_gates(self, mlstm_trace, q, k, i, f, gate, cell, **flags, **cfg.numerics)
        h, cell = ops.mlstm(q, k, v, i, f, cell, **flags, **cfg.cell)
        h = MultiHeadNorm(cfg.norm_eps, as_offset=False, name="multihead_norm")(h)
        near, window = ops.attention(
            q,
            k,
            v,
            window,
            **flags,
            window=cfg.window,
            num_sinks=cfg.num_sinks,
            rotary=Rotary(cfg.rotary_base),
        )
        g = jax.nn.sigmoid(gate)
        y = g * h + (1 - g) * near.reshape(*h.shape)
        y = Dense(dim, wang(dim, self.num_blocks), name="out_proj")(y)
        y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
        return y, HybridState(cell, window)

    @nn.nowrap
    def init_state(self, batch_size: Size, dim: int, dtype: DTypeLike = jnp.float32) -> HybridState:
        """The initial state: zeros; `window` has the dtype of activations."""
        cfg, K = self.cfg, dim // self.cfg.num_heads
        cell_dtype = jnp.promote_types(dtype, jnp.float32)
        return HybridState(
            mlstm_init(batch_size, cfg.num_heads, K, K, cell_dtype),
            attention_init(batch_size, cfg.num_sinks + cfg.window, cfg.num_heads, K, K, dtype),
        )
