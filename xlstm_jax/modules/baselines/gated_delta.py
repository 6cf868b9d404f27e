"""Gated delta net as a layer: convolutions, delta rule with a decay, gated norm per head.

Source: Yang et al. 2024, arXiv:2412.06464, section 3.4.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax import ops
from xlstm_jax.cells.gated_delta import GatedDeltaState, gated_delta_init
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.baselines.options import GatedDeltaConfig
from xlstm_jax.modules.checks import check_layer_state
from xlstm_jax.modules.conv import CausalConv, conv_state
from xlstm_jax.modules.initializers import (
    inverse_softplus_of_steps,
    log_uniform,
    small,
    wang,
)
from xlstm_jax.modules.linear import Dense, fused_dense
from xlstm_jax.modules.norm import RMSNorm
from xlstm_jax.ops.activations import silu, silu_gate
from xlstm_jax.typing import Array, Flag, Float, Size

STEPS = (1e-3, 0.1)
"""Bounds of the initial step sizes, as of Mamba-2."""


class GatedDeltaLayerState(NamedTuple):
    """Recurrent state of a gated delta net layer."""

    # Last W - 1 inputs of the convolutions of q, k and v, oldest first.
    conv: tuple[Float[Array, "B ... F"], ...]
    cell: GatedDeltaState


export.register_namedtuple_serialization(
    GatedDeltaLayerState, serialized_name="xlstm_jax.GatedDeltaLayerState"
)


class GatedDeltaLayer(nn.Module):
    """y = out(norm(rule(q, k, v, decay, beta)) * silu(z)), all projected from x.

    q, k and v pass through a convolution and silu; q and k are then scaled to norm 1.
    """

    cfg: GatedDeltaConfig
    num_blocks: int = 1  # of the model; scales down the initial output projection
    dropout: float = 0.0

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: GatedDeltaLayerState | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], GatedDeltaLayerState]:
        cfg, (batch, T, dim) = self.cfg, x.shape
        (K, V), H = cfg.widths(dim), cfg.num_heads
        check_layer_state(self, state, x)
        conv, cell = (None, None) if state is None else state
        flags: dict[str, Any] = dict(reset=reset, mask=mask)
        sizes = {"q": cfg.qk_heads * K, "k": cfg.qk_heads * K, "v": H * V, "gate": H * V}
        layers = (Dense(n, small(dim), name=name) for name, n in sizes.items())
        *parts, z = fused_dense(x, *layers)
        layers = (Dense(H, small(dim), upcast=True, name=name) for name in ("beta", "decay"))
        beta, decay = fused_dense(x, *layers)
        states = []
        for n, name in enumerate(("q", "k", "v")):
            convolve = CausalConv(cfg.conv_width, use_bias=False, name=f"conv_{name}")
            y, last = convolve(parts[n], None if conv is None else conv[n], **flags)
            parts[n] = silu(y).reshape(batch, T, -1, V if name == "v" else K)
            states.append(last)
        q, k, v = parts
        bias = self.param("dt_bias", inverse_softplus_of_steps(*STEPS), (H,))
        rate = jnp.exp(self.param("A_log", log_uniform, (H,)))
        steps = jax.nn.softplus(decay + bias.astype(decay.dtype)[None, None])
        h, cell = ops.gated_delta_rule(
            ops.unit_norm(q),
            ops.unit_norm(k),
            v,
            -rate.astype(steps.dtype)[None, None] * steps,
            jax.nn.sigmoid(beta),
            cell,
            **flags,
            chunk_size=cfg.chunk_size,
            implementation=cfg.implementation,
        )
        h = RMSNorm(cfg.norm_eps, name="norm")(h)
        y = silu_gate(z, h.reshape(batch, T, -1))
        y = Dense(dim, wang(dim, self.num_blocks), name="out_proj")(y)
        y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
        return y, GatedDeltaLayerState(tuple(states), cell)

    @nn.nowrap
    def init_state(
        self, batch_size: Size, dim: int, dtype: DTypeLike = jnp.float32
    ) -> GatedDeltaLayerState:
        """The initial state: zeros, in the dtype of activations; `cell` is float32 or wider."""
        cfg, cell_dtype = self.cfg, jnp.promote_types(dtype, jnp.float32)
        K, V = cfg.widths(dim)
        widths = cfg.qk_heads * K, cfg.qk_heads * K, cfg.num_heads * V
        return GatedDeltaLayerState(
            tuple(conv_state(batch_size, cfg.conv_width, width, dtype) for width in widths),
            gated_delta_init(batch_size, cfg.num_heads, K, V, cell_dtype),
        )
