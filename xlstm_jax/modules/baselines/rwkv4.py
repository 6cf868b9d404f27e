"""RWKV-4 as two layers: time mixing with the WKV operator, and channel mixing.

Both see the input of the step before (token shift). Source: Peng et al. 2023, arXiv:2305.13048,
sections 3.1 and 3.4; initial values: appendix E.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax import ops
from xlstm_jax.cells.wkv import WKVState, wkv_init
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.baselines.options import RWKV4Config
from xlstm_jax.modules.checks import check_layer_state
from xlstm_jax.modules.conv import conv_state
from xlstm_jax.modules.initializers import Initializer, small, wang
from xlstm_jax.modules.linear import Dense
from xlstm_jax.ops.activations import sigmoid_gate
from xlstm_jax.typing import Array, Flag, Float, Int, PRNGKeyArray, Size


class TimeMixState(NamedTuple):
    """Recurrent state of the time mixing layer."""

    shift: Float[Array, "B 1 D"]  # last input
    cell: WKVState


export.register_namedtuple_serialization(TimeMixState, serialized_name="xlstm_jax.TimeMixState")


def _depth(block_index: int | Int[Array, ""], num_blocks: int) -> Any:
    """0 for the first block, 1 for the last."""
    return block_index / max(num_blocks - 1, 1)


def _mix_init(power: Any, offset: Any = 0.0) -> Initializer:
    """(channel / width) ** power + offset."""

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "D"]:
        share = jnp.arange(shape[-1], dtype=jnp.float32) / shape[-1]
        return share ** jnp.asarray(power, jnp.float32) + jnp.asarray(offset, jnp.float32)

    return init


def _decay_init(depth: Any) -> Initializer:
    """log(-log decay): from -5 to 3 over the channels; the rise starts later in deeper blocks."""

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "F"]:
        share = jnp.arange(shape[-1], dtype=jnp.float32) / max(shape[-1] - 1, 1)
        return -5 + 8 * share ** jnp.asarray(0.7 + 1.3 * depth, jnp.float32)

    return init


def _bonus_init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "F"]:
    """log 0.3, plus a zigzag over the channels."""
    zigzag = ((jnp.arange(shape[-1]) + 1) % 3 - 1) * 0.5
    return (jnp.log(0.3) + zigzag).astype(jnp.float32)


class _Mixed(nn.Module):
    """mu * x + (1 - mu) * (x of the step before), with a share mu per channel."""

    share_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], before: Float[Array, "B T D"]):
        mu = self.param("share", self.share_init, x.shape[-1:]).astype(x.dtype)[None, None]
        return mu * x + (1 - mu) * before


class TimeMix(nn.Module):
    """y = out(sigmoid(r) * wkv(k, v)), with r, k and v projected from mixtures of two steps."""

    cfg: RWKV4Config
    num_blocks: int = 1  # of the model; sets initial values, with `block_index`
    block_index: int | Int[Array, ""] = 0  # of this block in the model, from 0

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: TimeMixState | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], TimeMixState]:
        del deterministic
        cfg, dim = self.cfg, x.shape[-1]
        F, depth = cfg.width(dim), _depth(self.block_index, self.num_blocks)
        check_layer_state(self, state, x)
        shift, cell = (None, None) if state is None else state
        flags: dict[str, Any] = dict(reset=reset, mask=mask)
        before, shift = ops.shift(x, shift, **flags)
        power = 1 - self.block_index / self.num_blocks
        inits = {
            "key": _mix_init(power),
            "value": _mix_init(power, 0.3 * depth),
            "receptance": _mix_init(0.5 * power),
        }
        k, v, r = (
            Dense(F, small(dim), name=name)(_Mixed(init, name=f"mix_{name}")(x, before))
            for name, init in inits.items()
        )
        log_decay = -jnp.exp(self.param("decay", _decay_init(depth), (F,)))
        bonus = self.param("bonus", _bonus_init, (F,))
        h, cell = ops.wkv(k, v, log_decay, bonus, cell, **flags, implementation=cfg.implementation)
        y = Dense(dim, wang(dim, self.num_blocks), name="out_proj")(sigmoid_gate(r, h))
        return y, TimeMixState(shift, cell)

    @nn.nowrap
    def init_state(
        self, batch_size: Size, dim: int, dtype: DTypeLike = jnp.float32
    ) -> TimeMixState:
        """The initial state: zeros, in the dtype of activations; `cell` is float32 or wider."""
        cell_dtype = jnp.promote_types(dtype, jnp.float32)
        cell = wkv_init(batch_size, self.cfg.width(dim), cell_dtype)
        return TimeMixState(conv_state(batch_size, 2, dim, dtype), cell)


class ChannelMix(nn.Module):
    """y = sigmoid(r) * down(relu(k)^2), with r and k projected from mixtures of two steps."""

    cfg: RWKV4Config
    num_blocks: int = 1
    block_index: int | Int[Array, ""] = 0

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Float[Array, "B 1 D"] | None = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:
        del deterministic
        dim = x.shape[-1]
        before, state = ops.shift(x, state, reset=reset, mask=mask)
        init = _mix_init(1 - self.block_index / self.num_blocks)
        k = _Mixed(init, name="mix_key")(x, before)
        r = _Mixed(init, name="mix_receptance")(x, before)
        k = Dense(self.cfg.ffn_width(dim), small(dim), name="key")(k)
        r = Dense(dim, small(dim), name="receptance")(r)
        down = Dense(dim, wang(dim, self.num_blocks), name="value")
        return sigmoid_gate(r, down(jnp.square(jax.nn.relu(k)))), state
