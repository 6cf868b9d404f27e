"""The LSTM over a sequence."""

from xlstm_jax.cells.lstm import LSTMState, lstm_scan
from xlstm_jax.ops import gated
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.typing import Array, Flag, Float

IMPLEMENTATIONS = {
    "recurrent": Implementation(lambda inputs: lstm_scan(*inputs[:4], **inputs.flags._asdict()))
}


@on_any_mesh(gated.out_axes(LSTMState))
def lstm(
    x: Float[Array, "B T 4 H K"],
    r: Float[Array, "H K 4 K"],
    b: Float[Array, "H 4 K"] | None = None,
    state: LSTMState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H K"], LSTMState]:
    """LSTM with recurrent weights inside each head.

    Args:
        x, r, b, state, reset, mask, reverse: as in `ops.slstm`.
        implementation: a name of `ops.implementations("lstm")`, or "auto".

    Returns h in the dtype of x, and the state after the last step, float32 or wider.

    Raises:
        ValueError: inconsistent shapes, or an unknown implementation.
        NotImplementedError: the implementation does not support this call; gives the reason.
    """
    inputs = gated.Inputs(x, r, b, state, Flags.of(reset, mask))
    return gated.run("lstm", IMPLEMENTATIONS, implementation, inputs, LSTMState, reverse=reverse)
