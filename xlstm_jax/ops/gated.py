"""What the ops `slstm` and `lstm` share: checks, and the call on a mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.checks import by_name, check_length, check_shapes
from xlstm_jax.ops.flags import FLAG_AXES, Flags, flip_time
from xlstm_jax.ops.sharded.shard_map import map_shards
from xlstm_jax.sharding.axes import constrain
from xlstm_jax.typing import Array, Float


class Inputs(NamedTuple):
    """Arguments of a cell with four gates and recurrent weights, all arrays."""

    x: Float[Array, "B T 4 H K"]
    r: Float[Array, "H K 4 K"]
    b: Float[Array, "H 4 K"] | None
    state: Any  # leaves "B H K"; None only before `run`
    flags: Flags


def run(
    op: str,
    table: Mapping[str, dispatch.Implementation],
    implementation: str,
    inputs: Inputs,
    kind: Any,
    *,
    reverse: bool,
    **options: str,
) -> tuple[Float[Array, "B T H K"], Any]:
    """The implementation `fn(inputs, **options)` that is chosen for a call whose shapes match.

    Each device computes its sequences and heads. The hidden state is fed back at every step, so no
    shard of time can be computed before the one before it: a sequence sharded over devices is
    all-gathered, and they compute the same. `kind` is the class of the state.
    """
    x, r, b, state, flags = inputs
    arrays = {"x": (x, "B T 4 H K"), "r": (r, "H K 4 K"), "b": (b, "H 4 K")}
    arrays |= by_name(flags, FLAG_AXES)
    if state is not None:
        arrays |= by_name(state, ("B H K",) * len(state), "state.")
    sizes = check_shapes(op, arrays)
    check_length(op, sizes)
    B, T, H, K = (sizes[axis] for axis in "BTHK")
    # What is float64 anywhere is computed in float64.
    wide = state_dtype(x, r)
    dtype = jnp.dtype(x.dtype) if wide == jnp.float32 else wide
    call = dispatch.Call(B, T, H, K, K, dtype, dispatch.platform())
    chosen = dispatch.choose(op, table, implementation, call)

    def local(x, r, b, state, flags):
        if state is None:
            zeros = jnp.zeros((x.shape[0], *x.shape[3:]), wide)
            state = kind(*(zeros for _ in kind._fields))
        state = jax.tree.map(lambda leaf: leaf.astype(wide), state)
        if reverse:
            x, flags = flip_time((x, flags))
        h, state = chosen.fn(Inputs(x, r, b, state, flags), **options)
        return flip_time(h) if reverse else h, state

    leaves = kind(*("B H K" for _ in kind._fields))
    axes = ("B T G H K", "H K G J", "H G K", leaves, FLAG_AXES)
    h, state = map_shards(local, tuple(inputs), axes, ("B T H K", leaves), {"B": B, "H": H})
    return constrain(h, "batch", "time", "heads", None), state
