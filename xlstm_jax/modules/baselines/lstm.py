"""The classic LSTM as a layer: alone, as in a stack of LSTMs, or in a Transformer block.

Source: Hochreiter & Schmidhuber 1997; both uses: Beck et al. 2024, arXiv:2405.04517, appendix.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from xlstm_jax import ops
from xlstm_jax.cells import LSTMState, lstm_init
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.baselines.options import LSTMConfig
from xlstm_jax.modules.checks import check_layer_state
from xlstm_jax.modules.initializers import uniform
from xlstm_jax.modules.linear import Dense
from xlstm_jax.typing import Array, Flag, Float, Size


class LSTMLayer(nn.Module):
    """h of an LSTM whose gates read x and, within each head, the h of the step before.

    Weights are initialized uniformly in +-1 / sqrt(D), as in PyTorch.
    """

    cfg: LSTMConfig
    num_blocks: int = 1  # of the model; has no effect
    dropout: float = 0.0

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LSTMState | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], LSTMState]:
        cfg, (B, T, D) = self.cfg, x.shape
        H, K = cfg.num_heads, D // cfg.num_heads
        check_layer_state(self, state, x)
        init = uniform(1 / math.sqrt(D))
        gates = Dense(4 * D, init, upcast=True, name="proj")(x).reshape(B, T, 4, H, K)
        r = self.param("recurrent_kernel", init, (H, K, 4, K))
        b = self.param("bias", init, (H, 4, K))
        flags = dict(reset=reset, mask=mask)
        h, state = ops.lstm(gates, r, b, state, **flags, implementation=cfg.implementation)
        h = h.reshape(B, T, D).astype(x.dtype)
        return nn.Dropout(self.dropout, deterministic=deterministic)(h), state

    @nn.nowrap
    def init_state(self, batch_size: Size, dim: int, dtype: DTypeLike = jnp.float32) -> LSTMState:
        """The initial state: zeros, float32 or wider."""
        H, cell_dtype = self.cfg.num_heads, jnp.promote_types(dtype, jnp.float32)
        return lstm_init(batch_size, H, dim // H, cell_dtype)
