"""Scan of a step function over time, with resets, masks and reversal, shared by all cells."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.typing import Array, Bool, Flag, Float


def scan_time(
    step: Callable[[Any, Any], tuple[Any, Float[Array, "B ..."]]],
    state: Any,
    inputs: Any,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    reverse: bool = False,
) -> tuple[Float[Array, "B T ..."], Any]:
    """Run `step(state, inputs at t) -> (state, h)` over axis 1 of every leaf of `inputs`.

    Args:
        step: one time step, in the argument order of `jax.lax.scan`.
        state: before the first step; batch is the first axis of every leaf. A reset state is zeros.
        inputs: a pytree of arrays `B T ...`.
        reset: where True, the state before this step is replaced by the initial one.
        mask: where False, the state stays bit-identical and h is 0; a reset at that position is
            ignored, and its inputs are not used, even if they are NaN.
        reverse: run from the last step to the first; outputs stay at their inputs' positions.

    Returns the outputs `B T ...`, and the state after the last step that was run.
    """

    reset, mask = (None if flag is None else as_bool(flag) for flag in (reset, mask))

    def body(state, inputs_t):
        x, reset, mask = inputs_t
        if reset is not None:
            reset = reset if mask is None else reset & mask
            # A select, not a product with zero, which would leave NaN in the state.
            state = jax.tree.map(lambda s: jnp.where(_expand_dims(reset, s), 0, s), state)
        if mask is None:
            return step(state, x)
        # Masked inputs become zeros: a NaN would survive in the gradient of the `where` below.
        x = jax.tree.map(lambda a: jnp.where(_expand_dims(mask, a), a, 0), x)
        updated, h = step(state, x)
        # A select leaves a masked state bit-identical, whatever the step computes.
        state = jax.tree.map(lambda a, b: jnp.where(_expand_dims(mask, a), a, b), updated, state)
        return state, jnp.where(_expand_dims(mask, h), h, 0)

    time_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (inputs, reset, mask))
    state, h = jax.lax.scan(body, state, time_first, reverse=reverse)
    return jnp.moveaxis(h, 0, 1), state


def vary_like(tree: Any, like: Any) -> Any:
    """`tree`, varying over all mesh axes over which an array of `tree` or `like` varies.

    Inside a caller's `shard_map` that checks this (check_vma=True), a constant does not vary, but
    the carry of a scan over local arrays does. Anywhere else `tree` is returned unchanged.
    """
    axes = set(varying_axes((tree, like)))

    def vary(leaf: Any) -> Any:
        missing = axes.difference(varying_axes(leaf)) if isinstance(leaf, jax.Array) else ()
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(vary, tree) if axes else tree


def varying_axes(tree: Any) -> tuple[str, ...]:
    """The Manual mesh axes over which arrays of a tree vary, if a `shard_map` checks it."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return tuple(set().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays)))


def as_bool(flag: Flag) -> Bool[Array, "B T"]:
    """A reset or mask as booleans."""
    return jnp.asarray(flag, bool)


def _expand_dims(flag: Bool[Array, "B"], leaf: Array) -> Array:
    """`flag` with trailing axes of size 1, so that it broadcasts against `leaf`."""
    return flag.reshape(flag.shape + (1,) * (leaf.ndim - flag.ndim))
