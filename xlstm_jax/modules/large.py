"""The mLSTM layer of the large architecture: no up-projection, a sigmoid output gate.

Source: Beck et al. 2025, arXiv:2503.13427 (xLSTM 7B), section 3.
"""

import dataclasses

import flax.linen as nn
import jax

from xlstm_jax import ops
from xlstm_jax.cells import MLSTMState
from xlstm_jax.modules.cell import CellConfig
from xlstm_jax.modules.checks import check_at_least, check_divides
from xlstm_jax.modules.feedforward import scaling_width
from xlstm_jax.modules.initializers import constant, linspace, small, wang, zeros
from xlstm_jax.modules.linear import Dense, dense_together
from xlstm_jax.modules.norm import MultiHeadNorm
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargeConfig(CellConfig):
    """Sizes and numerics of a large-architecture block (letter M)."""

    FIELD = "large"

    qk_dim: int | None = None  # H * K; None: dim // 2
    v_dim: int | None = None  # H * V; None: dim
    ffn_dim: int | None = None  # None: 2.667 * dim, rounded up to a multiple of 64
    use_bias: bool = False  # of projections and norms; the gates always have theirs
    gate_soft_cap: float | None = 15.0
    input_bias: float = -10.0  # initially nothing much is written
    norm_eps: float = 1e-6

    def widths(self, dim: int) -> tuple[int, int, int]:
        """H * K, H * V and the feed-forward width in a model of width `dim`."""
        return (
            dim // 2 if self.qk_dim is None else self.qk_dim,
            dim if self.v_dim is None else self.v_dim,
            scaling_width(dim) if self.ffn_dim is None else self.ffn_dim,
        )

    def check(self, dim: int) -> None:
        """Raises ConfigError where heads do not divide a width."""
        qk_dim, v_dim, ffn_dim = self.widths(dim)
        check_at_least("large.qk_dim", qk_dim, 1)
        check_at_least("large.v_dim", v_dim, 1)
        check_at_least("large.ffn_dim", ffn_dim, 1)
        check_divides("large.num_heads", self.num_heads, "qk_dim", qk_dim)
        check_divides("large.num_heads", self.num_heads, "v_dim", v_dim)


class LargeMLSTMLayer(nn.Module):
    """y = out(sigmoid(o) * norm(mLSTM(q, k, v, i, f))): everything is projected from x."""

    cfg: LargeConfig
    num_blocks: int  # of the model: deeper models start with smaller outputs

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MLSTMState | None = None,
        *,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MLSTMState]:
        cfg, dim = self.cfg, x.shape[-1]
        qk_dim, v_dim, _ = cfg.widths(dim)
        widths = {"q": qk_dim, "k": qk_dim, "v": v_dim, "output_gate": v_dim}
        projections = dense_together(
            x,
            *(
                Dense(
                    width, zeros if name == "output_gate" else small(dim), cfg.use_bias, name=name
                )
                for name, width in widths.items()
            ),
        )
        q, k, v, o = (constrain(y, "batch", "time", "inner") for y in projections)
        biases = {
            "input_gate": constant(cfg.input_bias),
            "forget_gate": linspace(*cfg.forget_bias),
        }
        gates = dense_together(
            x,
            *(
                Dense(cfg.num_heads, zeros, True, bias_init, wide=True, name=name)
                for name, bias_init in biases.items()
            ),
        )
        i, f = (ops.soft_cap(gate, cfg.gate_soft_cap) for gate in gates)
        h, state = cfg.run(q, k, v, i, f, state, reset=reset, mask=mask)
        norm = MultiHeadNorm(
            cfg.norm_eps, as_offset=False, use_bias=cfg.use_bias, name="multihead_norm"
        )
        out = Dense(dim, wang(dim, self.num_blocks), cfg.use_bias, name="out_proj")
        return out(jax.nn.sigmoid(o) * norm(h)), state

    @nn.nowrap
    def init_state(self, batch_size: int, dim: int) -> MLSTMState:
        """The empty memory."""
        qk_dim, v_dim, _ = self.cfg.widths(dim)
        return self.cfg.empty(batch_size, qk_dim, v_dim)
