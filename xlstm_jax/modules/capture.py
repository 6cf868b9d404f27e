"""Activations captured on the way: gates and states of every position, outputs of blocks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.typing import Array, Flag, Float, PyTree

NAMES = ("gates", "state", "hidden")
"""What can be captured."""


def check_names(capture: Sequence[str]) -> None:
    """Raises ValueError unless `capture` is a sequence of `NAMES`."""
    is_sequence = isinstance(capture, Sequence) and not isinstance(capture, str)
    if not is_sequence or not all(name in NAMES for name in capture):
        raise ArgumentError(
            f"capture must be a tuple of names from {NAMES}, got {quote(capture)}; "
            "write capture=('gates',) for one of them."
        )


def sow_gates(
    module: nn.Module, trace: Callable[..., Mapping[str, Array]], *args: Any, **options: Any
) -> None:
    """Stores what `trace(*args, **options)` returns, if the collection "gates" is captured.

    A layer of any block kind may call it; names must differ within a block. The arrays are
    `B T ...`.
    """
    # `init` makes every collection mutable, and would return the gates with the parameters.
    if module.is_mutable_collection("gates") and not module.is_initializing():
        for name, value in trace(*args, **options).items():
            module.sow("gates", name, value, init_fn=lambda: None, reduce_fn=_take_new)


def _take_new(old: Any, new: Any) -> Any:
    """Replaces Flax's tuple of all values: a call stores a name once."""
    return new


def gates_of_block(variables: Mapping[str, Any]) -> dict[str, Array]:
    """What the layers of one block stored, by name."""
    leaves = flatten_dict(variables.get("gates", {}))
    gates = {path[-1]: leaf for path, leaf in leaves.items()}
    if len(gates) < len(leaves):
        raise ArgumentError(
            f"names of captured gates must differ within a block, got {quote(sorted(leaves))}; "
            "rename one where it is passed to sow_gates."
        )
    return gates


def states_at_positions(
    step: Callable[..., tuple[Any, PyTree]],
    x: Float[Array, "B T D"],
    state: PyTree,
    last: PyTree,
    **flags: Flag | None,
) -> PyTree:
    """The state of a block after every position; its leaves are `B T ...`.

    Runs the block one position at a time, which holds for every kind.

    Args:
        step: the block, `step(x, state, **flags) -> (x, state)`.
        state: before the first position.
        last: after the last position, from one pass; only its type is used.
        flags: `reset` and `mask`.
    """
    # The carry of a scan has one type: dtype, sharding, mesh axes over which it varies.
    state = jax.tree.map(
        lambda leaf, like: jnp.zeros_like(like) + leaf.astype(like.dtype), state, last
    )

    def body(state, inputs):
        x, flags = jax.tree.map(lambda leaf: leaf[:, None], inputs)
        state = step(x, state, **flags)[1]
        return state, state

    time_first = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (x, flags))
    states = jax.lax.scan(body, state, time_first)[1]
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), states)


def collect(
    capture: Sequence[str], pattern: str, by_letter: Mapping[str, Mapping[str, PyTree]]
) -> dict[str, Any]:
    """Reorders captured trees: letter -> name becomes name -> letter.

    Outputs of blocks become one array in the order of the pattern. A letter whose blocks store no
    gates is left out.
    """
    captured: dict[str, Any] = {
        name: {letter: trees[name] for letter, trees in by_letter.items() if name in trees}
        for name in capture
    }
    if "hidden" in captured:
        outputs = captured["hidden"]
        positions = [n for letter in outputs for n, other in enumerate(pattern) if other == letter]
        captured["hidden"] = jnp.concatenate(list(outputs.values()))[np.argsort(positions)]
    return captured
