"""Resets and masks, which every recurrent op takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.typing import Array, Bool, Float


class Flags(NamedTuple):
    """Where a sequence is reset, and where it has no step; a reset that is masked is void."""

    reset: Bool[Array, "B T"] | None
    mask: Bool[Array, "B T"] | None

    def zero_masked(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """x with zeros at masked positions, whatever they hold (also NaN)."""
        if self.mask is None:
            return x
        return jnp.where(self.mask.reshape(self.mask.shape + (1,) * (x.ndim - 2)), x, 0)


FLAG_AXES = Flags._make(("B T", "B T"))


def flip_time(tree: Any) -> Any:
    """Every leaf `B T ...` in reverse order of time."""
    return jax.tree.map(lambda x: jnp.flip(x, axis=1), tree)
