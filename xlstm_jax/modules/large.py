"""mLSTM layer of the large architecture: no up-projection, a sigmoid output gate.

Source: Beck et al. 2025, arXiv:2503.13427 (xLSTM 7B), section 3.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from xlstm_jax import ops
from xlstm_jax.cells import MLSTMState, mlstm_init
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.capture import sow_gates
from xlstm_jax.modules.checks import check_layer_state
from xlstm_jax.modules.initializers import linspace, normal, small, wang, zeros
from xlstm_jax.modules.linear import Dense, fused_dense, input_and_forget_gates
from xlstm_jax.modules.norm import MultiHeadNorm
from xlstm_jax.modules.options import LargeConfig
from xlstm_jax.ops.activations import sigmoid_gate
from xlstm_jax.ops.trace import mlstm_trace
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Flag, Float, Size


class LargeMLSTMLayer(nn.Module):
    """y = out(sigmoid(o) * norm(mLSTM(q, k, v, i, f))), with q, k, v, o, i, f projected from x."""

    cfg: LargeConfig
    num_blocks: int = 1  # of the model; scales down the initial output projection
    dropout: float = 0.0

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MLSTMState | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], MLSTMState]:
        cfg, dim = self.cfg, x.shape[-1]
        check_layer_state(self, state, x)
        qk_dim, v_dim, _ = cfg.widths(dim)
        widths = {"q": qk_dim, "k": qk_dim, "v": v_dim}
        layers = [Dense(width, small(dim), cfg.use_bias, name=n) for n, width in widths.items()]
        # Zeros: the output gate starts at sigmoid(0) = 0.5 for every input.
        layers.append(Dense(v_dim, zeros, cfg.use_bias, name="output_gate"))
        q, k, v, o = (constrain(y, "batch", "time", "inner") for y in fused_dense(x, *layers))
        biases = normal(cfg.input_bias_std, cfg.input_bias), linspace(*cfg.forget_bias)
        gates = input_and_forget_gates(x, cfg.num_heads, biases)
        i, f = (ops.soft_cap(gate, cfg.gate_soft_cap) for gate in gates)
        q, k, v = (y.reshape(*y.shape[:2], cfg.num_heads, -1) for y in (q, k, v))
        flags: dict[str, Any] = dict(reset=reset, mask=mask)
        sow_gates(self, mlstm_trace, q, k, i, f, o, state, **flags, **cfg.numerics)
        h, state = ops.mlstm(q, k, v, i, f, state, **flags, **cfg.cell)
        norm = MultiHeadNorm(
            cfg.norm_eps, as_offset=False, use_bias=cfg.use_bias, name="multihead_norm"
        )
        out = Dense(dim, wang(dim, self.num_blocks), cfg.use_bias, name="out_proj")
        y = out(sigmoid_gate(o, norm(h)))
        return nn.Dropout(self.dropout, deterministic=deterministic)(y), state

    @nn.nowrap
    def init_state(self, batch_size: Size, dim: int, dtype: DTypeLike = jnp.float32) -> MLSTMState:
        """The initial state, all zeros, in `dtype`, that of activations, but at least float32."""
        (qk_dim, v_dim, _), H = self.cfg.widths(dim), self.cfg.num_heads
        cell_dtype = jnp.promote_types(dtype, jnp.float32)
        return mlstm_init(batch_size, H, qk_dim // H, v_dim // H, cell_dtype)
