"""Mamba as a layer: up-projection, convolution, selective state space, gate, down-projection.

Source: Gu & Dao 2023, arXiv:2312.00752, section 3.4.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax import ops
from xlstm_jax.cells.mamba import MambaState, mamba_init
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.baselines.options import MambaConfig
from xlstm_jax.modules.checks import check_layer_state
from xlstm_jax.modules.conv import CausalConv, conv_state
from xlstm_jax.modules.initializers import (
    inverse_softplus_of_steps,
    log_of_indices,
    ones,
    small,
    uniform,
    wang,
)
from xlstm_jax.modules.linear import Dense, fused_dense
from xlstm_jax.ops.activations import silu, silu_gate
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Flag, Float, Size


class MambaLayerState(NamedTuple):
    """Recurrent state of a Mamba layer."""

    conv: Float[Array, "B ... F"]  # last W - 1 inputs of the convolution, oldest first
    cell: MambaState


export.register_namedtuple_serialization(
    MambaLayerState, serialized_name="xlstm_jax.MambaLayerState"
)


class MambaLayer(nn.Module):
    """y = down(scan(u, dt, B, C) * silu(z)), with u = silu(conv(a)); a and z are projected from x.

    dt, B and C are projected from u, dt through a narrow layer.
    """

    cfg: MambaConfig
    num_blocks: int = 1  # of the model; scales down the initial output projection
    dropout: float = 0.0

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MambaLayerState | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], MambaLayerState]:
        cfg, dim = self.cfg, x.shape[-1]
        F, K, rank = cfg.width(dim), cfg.state_dim, cfg.rank(dim)
        check_layer_state(self, state, x)
        conv, cell = (None, None) if state is None else state
        flags: dict[str, Any] = dict(reset=reset, mask=mask)
        layers = (Dense(F, small(dim), cfg.use_bias, name=name) for name in ("x", "gate"))
        a, z = (constrain(y, "batch", "time", "inner") for y in fused_dense(x, *layers))
        convolve = CausalConv(cfg.conv_width, use_bias=cfg.conv_bias, name="conv")
        u, conv = convolve(a, conv, **flags)
        u = silu(u)
        sizes = {"dt_down": rank, "B": K, "C": K}
        dt, B, C = fused_dense(u, *(Dense(n, small(F), name=name) for name, n in sizes.items()))
        bias = inverse_softplus_of_steps(cfg.dt_min, cfg.dt_max)
        steps = Dense(F, uniform(rank**-0.5), True, bias, upcast=True, name="dt_up")(dt)
        # -1 to -K in every channel at first: time constants of 1 to 1 / K steps of size 1.
        A = -jnp.exp(self.param("A_log", log_of_indices, (F, K)))
        D = self.param("D", ones, (F,))
        y, cell = ops.selective_scan(
            u,
            constrain(jax.nn.softplus(steps), "batch", "time", "inner"),
            A,
            B,
            C,
            D,
            cell,
            **flags,
            chunk_size=cfg.chunk_size,
            implementation=cfg.implementation,
        )
        y = Dense(dim, wang(dim, self.num_blocks), cfg.use_bias, name="out_proj")(silu_gate(z, y))
        y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
        return y, MambaLayerState(conv, cell)

    @nn.nowrap
    def init_state(
        self, batch_size: Size, dim: int, dtype: DTypeLike = jnp.float32
    ) -> MambaLayerState:
        """The initial state: zeros, in the dtype of activations; `cell` is float32 or wider."""
        F, cell_dtype = self.cfg.width(dim), jnp.promote_types(dtype, jnp.float32)
        return MambaLayerState(
            conv_state(batch_size, self.cfg.conv_width, F, dtype),
            mamba_init(batch_size, F, self.cfg.state_dim, cell_dtype),
        )
