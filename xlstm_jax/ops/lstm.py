"""The LSTM over a sequence."""

import jax.numpy as jnp

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.cells.lstm import LSTMState, lstm_scan
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.checks import check_length, check_shapes
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.typing import Array, Bool, Float

# Ordered: "auto" takes the first that can serve the call.
IMPLEMENTATIONS = {"scan": Implementation(lstm_scan)}


def lstm(
    x: Float[Array, "B T 4 H K"],
    r: Float[Array, "H K 4 K"],
    b: Float[Array, "H 4 K"] | None = None,
    state: LSTMState | None = None,
    *,
    reset: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H K"], LSTMState]:
    """LSTM with recurrent weights inside each head.

    Args:
        x: pre-activations of (i, f, z, o) without the recurrent part.
        r: recurrent weights (input, gate, output).
        b: bias of the four gates.
        state: memory before the first step; None is the empty one.
        reset: where True, everything before this position is forgotten.
        mask: where False, the state is left as it is and h is 0.
        reverse: flips time in every argument and in h.
        implementation: a name of `ops.implementations("lstm")`, or "auto".

    Returns h in the dtype of x, and the state after the last step, float32 or wider.

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
        NotImplementedError: the implementation cannot serve this call; says why.
    """
    call = check_gated("lstm", x, r, b, state, reset, mask)
    chosen = dispatch.choose("lstm", IMPLEMENTATIONS, implementation, call)
    return chosen.fn(x, r, b, state, reset=reset, mask=mask, reverse=reverse)


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
