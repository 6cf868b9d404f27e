"""Code shared by the ops `slstm` and `lstm`: checks, dispatch, and sharding over a mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.cells.time import vary_like
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.checks import check_length, check_shapes, fields_with_axes
from xlstm_jax.ops.flags import FLAG_AXES, Flags, flip_time
from xlstm_jax.ops.sharded.shard_map import is_checked, map_shards
from xlstm_jax.sharding.axes import constrain
from xlstm_jax.typing import Array, Float


class Inputs(NamedTuple):
    """Arguments of a cell with four gates and recurrent weights, all arrays."""

    x: Float[Array, "B T 4 H K"]
    r: Float[Array, "H K 4 K"]
    b: Float[Array, "H 4 K"] | None
    state: Any  # leaves "B H K"; None only before `run`
    flags: Flags


def out_axes(state_type: Any) -> tuple[str, Any]:
    """The axes of h and of the state, as letters."""
    return "B T H K", state_type(*("B H K" for _ in state_type._fields))


def run(
    op: str,
    table: Mapping[str, dispatch.Implementation],
    implementation: str,
    inputs: Inputs,
    state_type: Any,
    *,
    reverse: bool,
    uses: frozenset[str] = frozenset(),
    **options: Any,
) -> tuple[Float[Array, "B T H K"], Any]:
    """Checks shapes, selects an implementation and calls it: `fn(inputs, **options)`.

    Each device computes its shard of batch and heads. The hidden state is fed back at every step,
    so shards of the sequence cannot be computed in parallel: a sequence sharded over devices is
    all-gathered, and these devices repeat the computation. `state_type` is the class of the state,
    and `uses` a field of `dispatch.Call`.
    """
    x, r, b, state, flags = inputs
    arrays = {"x": (x, "B T 4 H K"), "r": (r, "H K 4 K"), "b": (b, "H 4 K")}
    arrays |= fields_with_axes(flags, FLAG_AXES)
    if state is not None:
        arrays |= fields_with_axes(state, ("B H K",) * len(state), "state.")
    sizes = check_shapes(op, arrays)
    check_length(op, sizes)
    B, T, H, K = (sizes[axis] for axis in "BTHK")
    # One float64 argument makes the computation float64, which kernels do not support.
    wide = state_dtype(x, r)
    dtype = jnp.dtype(x.dtype) if wide == jnp.float32 else wide
    facts: dict[str, Any] = dict(check_vma=is_checked(inputs), uses=uses)
    call = dispatch.Call(B, T, H, K, K, dtype, dispatch.platform(), **facts)
    selected = dispatch.choose(op, table, implementation, call)

    def local(x, r, b, state, flags):
        if state is None:  # created here, with the sizes of the device's shard
            zeros = jnp.zeros((x.shape[0], *x.shape[3:]), wide)
            state = vary_like(state_type(*(zeros for _ in state_type._fields)), x)
        state = jax.tree.map(lambda leaf: leaf.astype(wide), state)
        # Inputs and outputs are flipped here, so no implementation needs a reverse mode.
        if reverse:
            x, flags = flip_time((x, flags))
        h, state = selected.fn(Inputs(x, r, b, state, flags), **options)
        return flip_time(h) if reverse else h, state

    results = out_axes(state_type)
    axes = ("B T G H K", "H K G J", "H G K", results[1], FLAG_AXES)
    # "T" has no size here: time is replicated.
    h, state = map_shards(local, tuple(inputs), axes, results, {"B": B, "H": H})
    # h is replicated over the devices that share a sequence; shard it again for the next layer.
    return constrain(h, "batch", "time", "heads", None), state
