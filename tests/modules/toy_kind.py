"""A block kind defined outside the library, for tests: `--import` or a CONFIG.py imports it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm_jax.config import ConfigError
from xlstm_jax.modules import BLOCKS, BlockKind, Dense
from xlstm_jax.modules.initializers import small


@dataclasses.dataclass(frozen=True)
class ToyOptions:
    """Options of the toy block."""

    width: int = 6  # of the state

    def check(self, dim):
        if self.width < 1:
            raise ConfigError(f"toy.width must be at least 1, got {self.width}; make it larger.")


class ToyBlock(nn.Module):
    """x + out(c_t), with the state c_t = (c_{t-1} + inner(x_t)) / 2."""

    cfg: object

    @nn.compact
    def __call__(self, x, state=None, *, reset=None, mask=None, deterministic=True):
        options = self.cfg.options_of("x")
        u = Dense(options.width, small(self.cfg.dim), name="inner")(x)
        state = self.init_state(x.shape[0]) if state is None else state
        reset = jnp.zeros(x.shape[:2], bool) if reset is None else reset
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask

        def step(c, inputs):
            u, reset, mask = inputs
            new = 0.5 * jnp.where(reset[:, None], 0, c) + 0.5 * u.astype(c.dtype)
            return jnp.where(mask[:, None], new, c), jnp.where(mask[:, None], new, 0)

        xs = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (u, reset, mask))
        state, h = jax.lax.scan(step, state, xs)
        out = Dense(x.shape[-1], small(options.width), name="out")
        return x + out(jnp.swapaxes(h, 0, 1).astype(x.dtype)), state

    @nn.nowrap
    def init_state(self, batch_size):
        return jnp.zeros((batch_size, self.cfg.options_of("x").width))


BLOCKS["x"] = BlockKind(
    name="toy",
    options=ToyOptions,
    block=ToyBlock,
    axes={r"inner/kernel": ("embed", "inner"), r"out/kernel": ("inner", "embed")},
    count_params=lambda cfg: 2 * cfg.dim * cfg.options_of("x").width,
    forward_flops=lambda cfg, count: 4 * cfg.dim * cfg.options_of("x").width,
)
