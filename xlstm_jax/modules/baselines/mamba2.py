"""Mamba-2 as a layer: convolution, state space with a decay per head, gated norm.

Source: Dao & Gu 2024, arXiv:2405.21060, section 7.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax import ops
from xlstm_jax.cells.ssd import SSDState, ssd_init
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.baselines.options import Mamba2Config
from xlstm_jax.modules.checks import check_layer_state
from xlstm_jax.modules.conv import CausalConv, conv_state
from xlstm_jax.modules.initializers import (
    inverse_softplus_of_steps,
    log_uniform,
    ones,
    small,
    wang,
)
from xlstm_jax.modules.linear import Dense, fused_dense
from xlstm_jax.modules.norm import GroupNorm
from xlstm_jax.ops.activations import silu, silu_gate
from xlstm_jax.typing import Array, Flag, Float, Size


class Mamba2LayerState(NamedTuple):
    """Recurrent state of a Mamba-2 layer."""

    # Last W - 1 inputs of the convolutions of x, B and C, oldest first.
    conv: tuple[Float[Array, "B ... F"], ...]
    cell: SSDState


export.register_namedtuple_serialization(
    Mamba2LayerState, serialized_name="xlstm_jax.Mamba2LayerState"
)


class Mamba2Layer(nn.Module):
    """y = down(norm(ssd(u, dt, B, C) * silu(z))), with z, u, B, C and dt projected from x.

    u, B and C pass through a convolution and silu. The norm is an RMS norm of each group.
    """

    cfg: Mamba2Config
    num_blocks: int = 1  # of the model; scales down the initial output projection
    dropout: float = 0.0

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Mamba2LayerState | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Mamba2LayerState]:
        cfg, (batch, T, dim) = self.cfg, x.shape
        F, H, shared = cfg.width(dim), cfg.heads(dim), cfg.groups * cfg.state_dim
        check_layer_state(self, state, x)
        conv, cell = (None, None) if state is None else state
        flags: dict[str, Any] = dict(reset=reset, mask=mask)
        sizes = {"gate": F, "x": F, "B": shared, "C": shared}
        layers = (Dense(n, small(dim), cfg.use_bias, name=name) for name, n in sizes.items())
        z, *parts = fused_dense(x, *layers)
        dt = Dense(H, small(dim), cfg.use_bias, upcast=True, name="dt")(x)
        states = []
        for n, name in enumerate(("x", "B", "C")):
            convolve = CausalConv(cfg.conv_width, use_bias=cfg.conv_bias, name=f"conv_{name}")
            y, last = convolve(parts[n], None if conv is None else conv[n], **flags)
            parts[n] = silu(y)
            states.append(last)
        u, B, C = parts
        B, C = (a.reshape(batch, T, cfg.groups, cfg.state_dim) for a in (B, C))
        bias = self.param("dt_bias", inverse_softplus_of_steps(cfg.dt_min, cfg.dt_max), (H,))
        A = -jnp.exp(self.param("A_log", log_uniform, (H,)))
        D = self.param("D", ones, (H,))
        y, cell = ops.ssd(
            u.reshape(batch, T, H, cfg.head_dim),
            jax.nn.softplus(dt + bias.astype(dt.dtype)[None, None]),
            A,
            B,
            C,
            D,
            cell,
            **flags,
            chunk_size=cfg.chunk_size,
            implementation=cfg.implementation,
        )
        y = silu_gate(z, y.reshape(batch, T, F))
        y = GroupNorm(cfg.groups, cfg.norm_eps, name="norm")(y)
        y = Dense(dim, wang(dim, self.num_blocks), cfg.use_bias, name="out_proj")(y)
        y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
        return y, Mamba2LayerState(tuple(states), cell)

    @nn.nowrap
    def init_state(
        self, batch_size: Size, dim: int, dtype: DTypeLike = jnp.float32
    ) -> Mamba2LayerState:
        """The initial state: zeros, in the dtype of activations; `cell` is float32 or wider."""
        cfg, cell_dtype = self.cfg, jnp.promote_types(dtype, jnp.float32)
        shared = cfg.groups * cfg.state_dim
        widths = cfg.width(dim), shared, shared
        return Mamba2LayerState(
            tuple(conv_state(batch_size, cfg.conv_width, width, dtype) for width in widths),
            ssd_init(batch_size, cfg.heads(dim), cfg.state_dim, cfg.head_dim, cell_dtype),
        )
