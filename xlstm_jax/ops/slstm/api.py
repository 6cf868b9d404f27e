"""The sLSTM over a sequence."""

import functools

from xlstm_jax.cells.slstm import SLSTMState
from xlstm_jax.ops import dispatch, slstm_kernel
from xlstm_jax.ops.checks import check_choice
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.gated import check_gated, on_a_mesh
from xlstm_jax.ops.slstm_scan import slstm_scan
from xlstm_jax.typing import Array, Bool, Float

# Ordered: "auto" takes the first that can serve the call.
IMPLEMENTATIONS = {
    "pallas_tpu": Implementation(slstm_kernel.slstm_tpu, slstm_kernel.tpu_refusal),
    "triton": Implementation(slstm_kernel.slstm_triton, slstm_kernel.triton_refusal),
    "scan": Implementation(slstm_scan),
}


def slstm(
    x: Float[Array, "B T 4 H K"],
    r: Float[Array, "H K 4 K"],
    b: Float[Array, "H 4 K"] | None = None,
    state: SLSTMState | None = None,
    *,
    reset: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    forget_gate: str = "sigmoid",
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H K"], SLSTMState]:
    """sLSTM: exponential input gate, memory mixing inside each head (arXiv:2405.04517, 2.2).

    Args:
        x: pre-activations of (i, f, z, o) without the recurrent part.
        r: recurrent weights (input, gate, output).
        b: bias of the four gates.
        state: memory before the first step; None is the empty one.
        reset: where True, everything before this position is forgotten.
        mask: where False, the state is left as it is and h is 0.
        forget_gate: "sigmoid" or "exp".
        reverse: flips time in every argument and in h.
        implementation: a name of `ops.implementations("slstm")`, or "auto".

    Returns h in the dtype of x, and the state after the last step, float32 or wider.

    Raises:
        ValueError: shapes that do not fit, an unknown gate or implementation.
        NotImplementedError: the implementation cannot serve this call; says why.
    """
    check_choice("slstm", "forget_gate", forget_gate, ("sigmoid", "exp"))
    call = check_gated("slstm", x, r, b, state, reset, mask)
    chosen = dispatch.choose("slstm", IMPLEMENTATIONS, implementation, call)
    compute = functools.partial(chosen.fn, forget_gate=forget_gate, reverse=reverse)
    return on_a_mesh(compute, SLSTMState, call, x, r, b, state, reset, mask)
