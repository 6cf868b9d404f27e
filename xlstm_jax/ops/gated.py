"""What the ops with four gates and memory mixing have in common: checks, and the call on a mesh."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.checks import check_length, check_shapes
from xlstm_jax.ops.sharded import per_device
from xlstm_jax.sharding import constrain


def check_gated(op: str, x, r, b, state, reset, mask) -> dispatch.Call:
    """The call of an op with four gates and memory mixing, once its shapes fit."""
    arrays = {
        "x": (x, "B T 4 H K"),
        "r": (r, "H K 4 K"),
        "b": (b, "H 4 K"),
        "reset": (reset, "B T"),
        "mask": (mask, "B T"),
    }
    leaves = {} if state is None else state._asdict()
    arrays |= {f"state.{name}": (leaf, "B H K") for name, leaf in leaves.items()}
    sizes = check_shapes(op, arrays)
    check_length(op, sizes)
    B, T, H, K = (sizes[axis] for axis in "BTHK")
    # What is float64 anywhere is computed in float64.
    wide = state_dtype(x, r)
    dtype = jnp.dtype(x.dtype) if wide == jnp.float32 else wide
    return dispatch.Call(B, T, H, K, K, dtype, dispatch.platform())


def on_a_mesh(
    compute: Callable[..., Any], kind: Any, call: dispatch.Call, x, r, b, state, reset, mask
):
    """`compute`, by each device for its rows and its heads; `kind` is the class of the state.

    Memories mix from step to step, so no span of time can be computed before the one before it:
    where the rules cut time it is gathered, and the devices along that cut compute the same.
    """

    def run(x, r, b, state, reset, mask):
        return compute(x, r, b, state, reset=reset, mask=mask)

    args = (x, r, b, state, reset, mask)
    state_axes = kind(*("B H K",) * len(kind._fields))
    names = ("B T G H K", "H K G J", "H G K", state_axes, "B T", "B T")
    axes = tuple(None if a is None else name for a, name in zip(args, names, strict=True))
    sizes = {"B": call.B, "H": call.H}
    h, state = per_device(run, args, axes, ("B T H K", state_axes), sizes)
    return constrain(h, "batch", "time", "heads", None), state
