"""First-generation sLSTM layer: a convolution for two gates, the cell, a norm per head.

Source: Beck et al. 2024, arXiv:2405.04517, figure 10 (post-up-projection block).
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax import ops
from xlstm_jax.cells import SLSTMState, slstm_init
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.capture import sow_gates
from xlstm_jax.modules.checks import check_layer_state
from xlstm_jax.modules.conv import CausalConv, conv_state
from xlstm_jax.modules.initializers import Initializer, linspace, small, uniform, zeros
from xlstm_jax.modules.linear import HeadwiseDense
from xlstm_jax.modules.norm import MultiHeadNorm
from xlstm_jax.modules.options import BiasInit, RecurrentInit, SLSTMConfig
from xlstm_jax.ops.activations import silu
from xlstm_jax.ops.trace import slstm_trace
from xlstm_jax.typing import Array, Flag, Float, Int, PRNGKeyArray, Size


class SLSTMLayerState(NamedTuple):
    """Recurrent state of a first-generation sLSTM layer."""

    conv: Float[Array, "B ... F"]  # last W - 1 inputs of the convolution, oldest first
    cell: SLSTMState


export.register_namedtuple_serialization(
    SLSTMLayerState, serialized_name="xlstm_jax.SLSTMLayerState"
)


class SLSTMLayer(nn.Module):
    """norm(sLSTM(i, f, z, o)), without an output projection.

    i and f are projected from silu(conv(x)), z and o from x.
    """

    cfg: SLSTMConfig
    num_blocks: int = 1  # of the model; with `block_index`, sets the initial forget bias
    dropout: float = 0.0
    block_index: int | Int[Array, ""] = 0  # of this block in the model, from 0

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: SLSTMLayerState | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], SLSTMLayerState]:
        cfg, (B, T, D) = self.cfg, x.shape
        H, K = cfg.num_heads, D // cfg.num_heads
        check_layer_state(self, state, x)
        conv, cell = (None, None) if state is None else state
        convolve = CausalConv(cfg.conv_width, cfg.conv_mixing, name="conv")
        u, conv = convolve(x, conv, reset=reset, mask=mask)
        if cfg.conv_width > 0:
            u = silu(u)
        inputs = {"input_gate": u, "forget_gate": u, "cell_input": x, "output_gate": x}
        gates = [
            HeadwiseDense(D, H, small(D), upcast=True, name=name)(y).reshape(B, T, H, K)
            for name, y in inputs.items()
        ]
        bias_init = cell_bias_init(cfg.bias_init, self.block_index, self.num_blocks)
        if cfg.memory_mixing:
            init = recurrent_init(cfg.recurrent_init)
            recurrent_kernel = self.param("recurrent_kernel", init, (H, K, 4, K))
        else:
            recurrent_kernel = jnp.zeros((H, K, 4, K), jnp.float32)
        arguments = (
            jnp.stack(gates, axis=2),
            recurrent_kernel,
            self.param("bias", bias_init, (H, 4, K)),
            cell,
        )
        options: dict[str, Any] = dict(reset=reset, mask=mask, forget_gate=cfg.forget_gate)
        options["stabilize"] = cfg.stabilize
        sow_gates(self, slstm_trace, *arguments, **options)
        h, cell = ops.slstm(*arguments, **options, implementation=cfg.implementation)
        # Dropout comes before the norm, as in the reference implementation.
        h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
        norm = MultiHeadNorm(
            cfg.norm_eps, as_offset=True, use_scale=cfg.group_norm_weight, name="group_norm"
        )
        return norm(h).astype(x.dtype), SLSTMLayerState(conv, cell)

    @nn.nowrap
    def init_state(
        self, batch_size: Size, dim: int, dtype: DTypeLike = jnp.float32
    ) -> SLSTMLayerState:
        """The initial state: zeros, in the dtype of activations; `cell` is float32 or wider."""
        conv = conv_state(batch_size, self.cfg.conv_width, dim, dtype)
        H, cell_dtype = self.cfg.num_heads, jnp.promote_types(dtype, jnp.float32)
        return SLSTMLayerState(conv, slstm_init(batch_size, H, dim // H, cell_dtype))


def recurrent_init(name: RecurrentInit) -> Initializer:
    """Initializer of the recurrent weights, `H K 4 K`."""
    if name == "zeros":
        return zeros
    return lambda key, shape: uniform(1 / math.sqrt(shape[0] * shape[1]))(key, shape)


def cell_bias_init(
    name: BiasInit, block_index: int | Int[Array, ""], num_blocks: int
) -> Initializer:
    """Initializer of the bias of the gates i, f, z, o, `H 4 K`.

    "powerlaw_blockdependent" and "small_init" set the forget bias; the other biases are zero.
    """
    if name == "zeros":
        return zeros
    if name == "standard":
        return lambda key, shape: uniform(1 / math.sqrt(shape[0] * shape[2]))(key, shape)
    depth = block_index / (num_blocks - 1) if num_blocks > 1 else 0.0

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "H 4 K"]:
        H, _, K = shape
        if name == "small_init":
            forget = linspace(3.0, 6.0)(key, (H, K))
        else:  # from 5 down to -7 within a head; the decrease starts later in deeper blocks
            fraction = jnp.linspace(0.0, 1.0, K, dtype=jnp.float32)
            forget = 5.0 - 12.0 * fraction ** jnp.asarray(0.3 + 1.3 * depth, jnp.float32)
        return jnp.zeros(shape, jnp.float32).at[:, 1].set(forget)

    return init
