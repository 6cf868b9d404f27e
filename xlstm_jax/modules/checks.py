"""Checks of states and parameters against those of a model; each error is one line."""

from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlstm_jax.errors import ArgumentError, quote, quote_path
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.typing import Array, Float, PyTree

_KINDS = {"floats": jnp.floating, "integers": jnp.integer, "booleans": jnp.bool_}


def difference(actual: PyTree, expected: PyTree) -> str | None:
    """The first leaf that differs in path, shape or kind of number; None if none does."""
    actual, expected = _describe(actual), _describe(expected)
    for path in [*expected, *actual]:
        a, b = actual.get(path, "nothing"), expected.get(path, "nothing")
        if a != b:
            return f"leaf {quote_path(path)!r} must be {b}, got {a}"
    return None


def check_state(state: PyTree, init: Callable[[], PyTree], owner: str, remedy: str) -> None:
    """Raises ValueError unless the state is None or has the leaves of the initial state.

    Args:
        init: returns the initial state.
        owner: what the state belongs to.
        remedy: the call that returns the initial state.
    """
    if state is None:
        return
    if mismatch := difference(state, jax.eval_shape(init)):
        raise ArgumentError(f"state must be that of {owner}: {mismatch}; use {remedy}, or None.")


def check_layer_state(layer: Any, state: PyTree, x: Float[Array, "B T D"]) -> None:
    """`check_state` for a layer with `init_state(batch_size, dim)`."""
    if state is None:
        return
    B, dim = x.shape[0], x.shape[-1]
    owner = f"{type(layer).__name__} and {B} sequences of width {dim}"
    check_state(state, lambda: layer.init_state(B, dim), owner, f"its init_state({B}, {dim})")


def check_param_names(module: nn.Module, names: Collection[str]) -> None:
    """Raises ValueError if the module has parameters, or submodules with some, of other names.

    Flax ignores them, and the result would be that of another model.
    """
    others = sorted(set(module.variables.get("params", {})) - set(names))
    if others:
        raise ArgumentError(
            f"params must have no entries but {sorted(names)}, got also {quote(others)}; "
            "use parameters from `init` of the same config."
        )


def _describe(tree: PyTree) -> dict[str, str]:
    """Path -> kind of number and shape of each leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
    return {path_name(path): _describe_leaf(leaf) for path, leaf in leaves}


def _describe_leaf(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return quote(leaf)
    kind = next((name for name, kind in _KINDS.items() if jnp.issubdtype(dtype, kind)), str(dtype))
    return f"{kind} of shape {tuple(leaf.shape)}"
