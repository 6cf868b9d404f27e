"""Resets and masks, arguments of every op over time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.time import as_bool
from xlstm_jax.typing import Array, Bool, Flag, Float


class Flags(NamedTuple):
    """Resets of the state, and the mask of valid positions; a masked reset is ignored."""

    reset: Bool[Array, "B T"] | None
    mask: Bool[Array, "B T"] | None

    @classmethod
    def of(cls, reset: Flag | None, mask: Flag | None) -> "Flags":
        """The arguments of an op as booleans."""
        return cls(*(None if flag is None else as_bool(flag) for flag in (reset, mask)))

    @property
    def valid_reset(self) -> Bool[Array, "B T"] | None:
        """The resets that count: those of masked positions are ignored."""
        if self.reset is None or self.mask is None:
            return self.reset
        return self.reset & self.mask

    def zero_masked(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """x with zeros at masked positions, whatever their values (also NaN)."""
        if self.mask is None:
            return x
        # A select, not a product with the mask, which would leave NaN.
        return jnp.where(self.mask.reshape(self.mask.shape + (1,) * (x.ndim - 2)), x, 0)


FLAG_AXES = Flags._make(("B T", "B T"))


def flip_time(tree: Any) -> Any:
    """Every leaf `B T ...`, reversed in time."""
    return jax.tree.map(lambda x: jnp.flip(x, axis=1), tree)
