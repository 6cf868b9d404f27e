"""The LSTM over a sequence."""

import functools

from xlstm_jax.cells.lstm import LSTMState, lstm_scan
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.gated import check_gated, on_a_mesh
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
    compute = functools.partial(chosen.fn, reverse=reverse)
    return on_a_mesh(compute, LSTMState, call, x, r, b, state, reset, mask)
