"""Running a step along time: resets, masks and reversal, the same for every cell."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.typing import Array, Bool, Float


def scan_time(
    step: Callable[[Any, Any], tuple[Any, Float[Array, "B ..."]]],
    state: Any,
    inputs: Any,
    *,
    reset: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Array, "B T ..."], Any]:
    """Run `step(state, inputs at t) -> (state, h)` over axis 1 of every leaf of `inputs`.

    Args:
        step: one time step, in the argument order of `jax.lax.scan`.
        state: before the first step; every leaf has the batch first. The initial state is zeros.
        inputs: a pytree of arrays `B T ...`.
        reset: where True, the state before this step is replaced by the initial one.
        mask: where False, the state stays bit-identical and h is 0; a reset
            there is void and the inputs (also NaN) are never read.
        reverse: run from the last step to the first; outputs stay at their inputs' positions.

    Returns the outputs `B T ...` and the state after the last step run.
    """

    def body(state, now):
        x, reset, mask = now
        if reset is not None:
            forget = reset if mask is None else reset & mask
            state = jax.tree.map(lambda s: jnp.where(_like(forget, s), 0, s), state)
        if mask is None:
            return step(state, x)
        # Zeros in place of what is masked: a NaN there would survive in the gradient of `where`.
        x = jax.tree.map(lambda a: jnp.where(_like(mask, a), a, 0), x)
        new, h = step(state, x)
        kept = jax.tree.map(lambda a, b: jnp.where(_like(mask, a), a, b), new, state)
        return kept, jnp.where(_like(mask, h), h, 0)

    time_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (inputs, reset, mask))
    state, h = jax.lax.scan(body, state, time_first, reverse=reverse)
    return jnp.moveaxis(h, 0, 1), state


def _like(flag: Bool[Array, "B"], leaf: Array) -> Array:
    """`flag` with trailing axes of size 1, so that it broadcasts against `leaf`."""
    return flag.reshape(flag.shape + (1,) * (leaf.ndim - flag.ndim))
