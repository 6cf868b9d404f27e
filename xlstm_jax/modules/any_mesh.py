"""Layers on every type of mesh axis; see `ops.sharded.any_mesh`."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.core import lift
from jax.sharding import PartitionSpec as P

from xlstm_jax.cells import LSTMState, MLSTMState, SLSTMState
from xlstm_jax.cells.attention import AttentionState
from xlstm_jax.cells.gated_delta import GatedDeltaState
from xlstm_jax.cells.mamba import MambaState
from xlstm_jax.cells.ssd import SSDState
from xlstm_jax.cells.wkv import WKVState
from xlstm_jax.ops.sharded.any_mesh import call_on_auto_axes, shard_explicit
from xlstm_jax.typing import Array


def on_any_mesh(call: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `__call__` of a module, whose result is `B T ...`, alone or with a state.

    Code of the module, and of every module in it, sees Auto axes instead of Explicit ones.
    """

    def transform(fn: Callable[..., Any]) -> Callable[..., Any]:
        def local(scope_fn, repack_fn, variables, rngs, *args, **kwargs):
            def run(variables, rngs, args, kwargs):
                scope = scope_fn(variables, rngs)
                return fn(scope, *args, **kwargs), repack_fn(scope)

            result, new_variables = call_on_auto_axes(run, (variables, rngs, args, kwargs), {})
            if not jax.sharding.get_abstract_mesh().explicit_axes:
                return result, new_variables
            # New parameters are replicated: `tree_shardings` has the sharding of the rules.
            return _explicit(result), jax.tree.map(
                lambda leaf: jax.sharding.reshard(leaf, P()), new_variables
            )

        return lift.pack(local, (True,), (True,), (True,), enable_kwargs=True)

    lifted = nn.transforms.decorator_lift_transform(transform, call)

    @functools.wraps(call)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        is_auto = not (mesh.explicit_axes or mesh.manual_axes)
        return (call if is_auto else lifted)(self, *args, **kwargs)

    return wrapper


_STATE_AXES = {
    AttentionState: "B H",
    GatedDeltaState: "B H",
    LSTMState: "B H",
    MLSTMState: "B H",
    MambaState: "B F",
    SLSTMState: "B H",
    SSDState: "B H",
    WKVState: "B F",
}
"""First axes of the leaves of a cell's state; other states are sharded over B only."""


def _explicit(result: Any) -> Any:
    """The results of a module, on Explicit axes."""
    if isinstance(result, jax.Array):
        return shard_explicit(result, "B T" + " _" * (result.ndim - 2))
    y, *rest = result
    return _explicit(y), *(_explicit_state(tree) for tree in rest)


def _explicit_state(state: Any) -> Any:
    """Leaves of a state on Explicit axes: those of `_STATE_AXES`, after `layers` if stacked."""
    # The state of a model is a dict by letter, those of its layers are stacked or in a list.
    is_stacked = isinstance(state, dict) and not any(isinstance(s, list) for s in state.values())
    layers = ["_"] if is_stacked else []

    def of_node(node: Any) -> Any:
        axes = [*layers, *_STATE_AXES.get(type(node), "B").split()]

        def of_leaf(leaf: Array) -> Array:
            rest = ["_"] * (leaf.ndim - len(axes))
            return shard_explicit(leaf, " ".join((axes + rest)[: leaf.ndim]))

        return jax.tree.map(of_leaf, node)

    return jax.tree.map(of_node, state, is_leaf=lambda node: type(node) in _STATE_AXES)
