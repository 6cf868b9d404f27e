"""The network of TiRex-2: patches of all variates in, quantiles of the next patches out.

A variate is one series: a target or a covariate. Time mixers are xLSTM blocks that read each
variate forward, and covariates with a known future backward too. Variate mixers are attention
between the variates of a group at one position, in which a covariate does not see targets.

Source: Podest et al. 2026, arXiv:2607.01204, section 3. `V` is the axis of variates, `T` that of
patches, `P` that of values in a patch.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm_jax import ops
from xlstm_jax.cells import MLSTMState, SLSTMState
from xlstm_jax.cells.logspace import exact_einsum, state_dtype
from xlstm_jax.errors import UnsupportedError
from xlstm_jax.modules.feedforward import ACTIVATIONS, FeedForward, LargeFeedForward
from xlstm_jax.modules.initializers import small, zeros
from xlstm_jax.modules.large import LargeMLSTMLayer
from xlstm_jax.modules.linear import Dense, HeadwiseDense, fused_dense
from xlstm_jax.modules.norm import MultiHeadNorm, RMSNorm
from xlstm_jax.modules.options import LargeConfig
from xlstm_jax.modules.slstm import cell_bias_init
from xlstm_jax.modules.tirex.config import TiRexBlockConfig, TiRexConfig
from xlstm_jax.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree

GATES = ("input_gate", "forget_gate", "cell_input", "output_gate")

CellState = MLSTMState | SLSTMState


class Roles(NamedTuple):
    """What each variate is."""

    group: Int[Array, "V"]  # variates of one series have the same number
    is_target: Bool[Array, "V"]
    is_known: Bool[Array, "V"] | None = None  # a covariate with values in the future; None: none is


class SLSTMCell(nn.Module):
    """norm(sLSTM(i, f, z, o)), with all gates projected head by head from x."""

    num_heads: int
    depth: tuple[int, int] = (0, 1)  # index of the block and number of blocks: initial forget bias

    @nn.compact
    def __call__(
        self, x: Float[Array, "V T D"], state: SLSTMState | None = None
    ) -> tuple[Float[Array, "V T D"], SLSTMState]:
        (V, T, D), H = x.shape, self.num_heads
        gates = [HeadwiseDense(D, H, small(D), upcast=True, name=name)(x) for name in GATES]
        r = self.param("recurrent_kernel", zeros, (H, D // H, 4, D // H))
        bias_init = cell_bias_init("powerlaw_blockdependent", *self.depth)
        b = self.param("bias", bias_init, (H, 4, D // H))
        h, state = ops.slstm(jnp.stack(gates, axis=2).reshape(V, T, 4, H, D // H), r, b, state)
        norm = MultiHeadNorm(1e-6, as_offset=False, name="group_norm")
        return norm(h).astype(x.dtype), state


class TimeMixer(nn.Module):
    """x + cell(norm(x)), then x + feedforward(norm(x)), for each variate on its own."""

    cfg: TiRexConfig
    index: int  # of the block

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "V T D"],
        state: CellState | None = None,
        is_known: Bool[Array, "V"] | None = None,
    ) -> tuple[Float[Array, "V T D"], CellState]:
        cfg = self.cfg
        cell = new_cell(cfg, self.index, name="cell")
        u = RMSNorm(name="norm")(x)
        h, state = cell(u, state)
        if is_known is not None:
            # One cell for both directions. Computed for all variates, so that shapes are static.
            backward, _ = cell(jnp.flip(u, axis=1), None)
            merge = Dense(cfg.dim, small(cfg.dim), name="merge")
            both = fused_dense([h, jnp.flip(backward, axis=1)], merge)[0]
            h = jnp.where(is_known[:, None, None], both, h)
        x = x + h
        ffn = LargeFeedForward(cfg.ffn_dim, len(cfg.blocks), name="ffn")
        return x + ffn(RMSNorm(name="ffn_norm")(x)), state


def new_cell(cfg: TiRexConfig, index: int, name: str | None = None) -> nn.Module:
    """The recurrent layer of a block."""
    block: TiRexBlockConfig = cfg.blocks[index]
    if block.cell == "slstm":
        return SLSTMCell(block.num_heads, (index, len(cfg.blocks)), name=name)
    large = LargeConfig(num_heads=block.num_heads, input_bias=0.0, input_bias_std=0.1)
    return LargeMLSTMLayer(large, len(cfg.blocks), name=name)


class VariateMixer(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)), at each position on its own.

    A variate that is alone in its group passes unchanged.
    """

    cfg: TiRexConfig
    num_heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "V T D"], roles: Roles) -> Float[Array, "V T D"]:
        cfg, D = self.cfg, self.cfg.dim
        same_group = roles.group[:, None] == roles.group[None]
        is_visible = same_group & (roles.is_target[:, None] | ~roles.is_target[None])
        u = RMSNorm(name="norm")(x)
        layers = [Dense(D, small(D), name=name) for name in ("q", "k", "v")]
        q, k, v = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in fused_dense(u, *layers))
        if cfg.normalize_qk:
            q, k = (ops.rms_norm(y, eps=float(jnp.finfo(y.dtype).eps)) for y in (q, k))
        h = variate_attention(q, k, v, is_visible).reshape(x.shape)
        y = x + Dense(D, small(D), name="out_proj")(h)
        ffn = FeedForward(4 * D, len(cfg.blocks), cfg.activation, name="ffn")
        y = y + ffn(RMSNorm(name="ffn_norm")(y))
        is_alone = same_group.sum(axis=1) == 1
        return jnp.where(is_alone[:, None, None], x, y)


def variate_attention(
    q: Float[Array, "V T H K"],
    k: Float[Array, "V T H K"],
    v: Float[Array, "V T H K"],
    is_visible: Bool[Array, "V V"],
) -> Float[Array, "V T H K"]:
    """Softmax attention between variates at each position; each must see at least itself."""
    wide = state_dtype(q)
    logits = exact_einsum("VTHK,UTHK->THVU", q, k, dtype=wide) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(is_visible[None, None], logits, -jnp.inf), axis=-1)
    return exact_einsum("THVU,UTHK->VTHK", weights.astype(v.dtype), v)


class ResidualMLP(nn.Module):
    """output(activation(hidden(x))) + residual(x), all with biases."""

    hidden_dim: int
    out_dim: int
    activation: str

    @nn.compact
    def __call__(self, x: Float[Array, "V T F"]) -> Float[Array, "V T out"]:
        init, D = small(x.shape[-1]), self.out_dim
        hidden, residual = fused_dense(
            x,
            Dense(self.hidden_dim, init, use_bias=True, name="hidden"),
            Dense(D, init, use_bias=True, name="residual"),
        )
        output = Dense(D, small(self.hidden_dim), use_bias=True, name="output")
        return output(ACTIVATIONS[self.activation](hidden)) + residual


class TiRex(nn.Module):
    """Embedding of patches, blocks of a time and a variate mixer, norm; `head` makes quantiles."""

    cfg: TiRexConfig

    def setup(self):
        cfg = self.cfg
        self.embed = ResidualMLP(cfg.embed_dim, cfg.dim, cfg.activation)
        self.time = [TimeMixer(cfg, index) for index in range(len(cfg.blocks))]
        self.variate = [VariateMixer(cfg, block.num_variate_heads) for block in cfg.blocks]
        if cfg.final_norm_eps is not None:
            self.norm = RMSNorm(cfg.final_norm_eps)
        self.output = ResidualMLP(cfg.head_dim, len(cfg.quantiles) * cfg.patch_size, cfg.activation)

    def __call__(
        self,
        patches: Float[Array, "V T P"],
        state: tuple[CellState, ...] | None = None,
        roles: Roles | None = None,
    ) -> tuple[Float[Array, "V T D"], tuple[CellState, ...]]:
        """Hidden states of scaled patches.

        Args:
            patches: NaN where a value is missing.
            state: of the time mixers after the positions before; None: before the first one.
            roles: None: each variate is a target in a group of its own, so that the variate mixers
                and the backward direction have no effect and are skipped.

        Returns the hidden states, and the state after the last position.

        Raises:
            UnsupportedError: with a state, some variates are read backward.
        """
        if state is not None and roles is not None and roles.is_known is not None:
            raise UnsupportedError(
                "roles.is_known must be None with a state, as covariates with a known future are "
                "read backward, which needs all positions at once; pass no state."
            )
        is_present = ~jnp.isnan(patches)
        inputs = [jnp.where(is_present, patches, 0), is_present.astype(patches.dtype)]
        x = self.embed(jnp.concatenate(inputs, axis=-1))
        states = []
        for index, (time, variate) in enumerate(zip(self.time, self.variate, strict=True)):
            before = None if state is None else state[index]
            x, after = time(x, before, roles.is_known if roles else None)
            x = variate(x, roles) if roles else x
            states.append(after)
        return x if self.cfg.final_norm_eps is None else self.norm(x), tuple(states)

    def head(self, hidden: Float[Array, "V T D"]) -> Float[Array, "V quantiles values"]:
        """Scaled quantiles of the patches that follow each position."""
        V, T, _ = hidden.shape
        y = self.output(hidden).reshape(V, T, len(self.cfg.quantiles), self.cfg.patch_size)
        return jnp.swapaxes(y, 1, 2).reshape(V, len(self.cfg.quantiles), -1)

    def quantiles(
        self, patches: Float[Array, "V T P"], roles: Roles | None = None
    ) -> Float[Array, "V quantiles values"]:
        """Quantiles at every position, from the initial state."""
        return self.head(self(patches, None, roles)[0])


def init_params(cfg: TiRexConfig, key: PRNGKeyArray) -> PyTree:
    """Random parameters, for training or for tests."""
    one = jnp.zeros(1, jnp.int32)
    roles = Roles(one, one == 1, one == 0)  # a covariate, so that every layer is called
    patches = jnp.zeros((1, 1, cfg.patch_size), jnp.float32)
    return TiRex(cfg).init(key, patches, roles, method=TiRex.quantiles)["params"]


def param_shapes(cfg: TiRexConfig) -> PyTree:
    """The tree of parameters as shapes, without computing them."""
    return jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
