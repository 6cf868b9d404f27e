"""The residual block that the block kinds share."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.typing import Array, Flag, Float, Size


class ResidualBlock(nn.Module):
    """x + layer(norm(x)), then x + ffn(norm(x)) if the block has a feed-forward layer."""

    cfg: LMConfig

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Any = None,
        *,
        reset: Flag | None = None,
        mask: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the output of the block and the new state; arguments are those of the layer."""
        # Built here, inside the compact method, so that Flax registers them as submodules.
        norm, layer, *ffn = self._parts()
        y, state = layer(norm(x), state, reset=reset, mask=mask, deterministic=deterministic)
        x = x + y
        if ffn:
            norm, layer = ffn
            x = x + layer(norm(x), deterministic=deterministic)
        return x, state

    @nn.nowrap
    def init_state(self, batch_size: Size, dtype: DTypeLike | None = None) -> Any:
        """The initial state, zeros, for activations of `dtype`; None: `cfg.dtype`."""
        dtype = jnp.dtype(self.cfg.dtype if dtype is None else dtype)
        # parent=None, as an unbound module cannot create submodules.
        return self._layer(parent=None).init_state(batch_size, self.cfg.dim, dtype)

    def _parts(self) -> tuple[nn.Module, ...]:
        """The norm and the layer, then the feed-forward norm and layer if the block has them."""
        raise NotImplementedError

    def _layer(self, **options: Any) -> Any:
        raise NotImplementedError
