"""The sLSTM over a sequence."""

from typing import Any

from xlstm_jax.cells.slstm import SLSTMState, slstm_scan
from xlstm_jax.ops import dispatch, gated
from xlstm_jax.ops.checks import check_choice
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.ops.slstm.recurrent import slstm_recurrent
from xlstm_jax.typing import Array, Flag, Float

NO_STABILIZER = "stabilize=False"
"""A name in `dispatch.Call.uses`."""


def _kernels(backend: str) -> Implementation:
    """The kernels of the backend "tpu" or "triton", as an implementation."""

    def unsupported(call: dispatch.Call) -> str | None:
        reason = dispatch.kernel_refusal(backend, call)
        if reason is not None:
            return reason
        if NO_STABILIZER in call.uses:
            return f"it has no {NO_STABILIZER}"
        from pallas_kernels.slstm import backends

        return getattr(backends, backend)().refusal(call.K, call.dtype)

    def compute(inputs: gated.Inputs, forget_gate: str, *, stabilize: bool):
        assert stabilize
        from pallas_kernels.slstm import api, backends

        x, r, b, state, flags = inputs
        kernels = getattr(backends, backend)()
        h, state = api.slstm(kernels, x, r, b, tuple(state), *flags, forget_gate=forget_gate)
        return h, SLSTMState(*state)

    return Implementation(compute, unsupported)


def _recurrent(inputs: gated.Inputs, forget_gate: str, *, stabilize: bool):
    if stabilize:
        return slstm_recurrent(inputs, forget_gate)
    # The hand-written gradient relies on the stabilizer; here, autodiff computes it.
    x, r, b, state, flags = inputs
    gates = {"forget_gate": forget_gate, "stabilize": False}
    return slstm_scan(x, r, b, state, **flags._asdict(), **gates)


# Ordered by preference: "auto" selects the first that supports the call.
IMPLEMENTATIONS = {
    "pallas_tpu": _kernels("tpu"),
    "triton": _kernels("triton"),
    "recurrent": Implementation(_recurrent),
}


@on_any_mesh(gated.out_axes(SLSTMState))
def slstm(
    x: Float[Array, "B T 4 H K"],
    r: Float[Array, "H K 4 K"],
    b: Float[Array, "H 4 K"] | None = None,
    state: SLSTMState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    forget_gate: str = "sigmoid",
    stabilize: bool = True,
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H K"], SLSTMState]:
    """sLSTM: exponential input gate, memory mixing within heads (arXiv:2405.04517, section 2.2).

    Args:
        x: pre-activations of (i, f, z, o) without the recurrent part. i may be -inf: h is 0 until
            an input gate opens.
        r: recurrent weights (input, gate, output).
        b: bias of the four gates.
        state: before the first step; None is the initial state, zeros in every leaf.
        reset: where True, the state before this position is replaced by the initial one.
        mask: where False, the state stays bit-identical, h is 0 and resets are ignored.
        forget_gate: activation of the forget gate, "sigmoid" or "exp".
        stabilize: False, for ablations: m is 0, and the exponential of a gate above 88 is inf.
        reverse: run from the last position to the first.
        implementation: a name of `ops.implementations("slstm")`, or "auto".

    Returns h in the dtype of x, and the state after the last step, float32 or wider.

    Raises:
        ValueError: inconsistent shapes, an unknown gate or implementation.
        NotImplementedError: the implementation does not support this call; gives the reason.
    """
    check_choice("slstm", "forget_gate", forget_gate, ("sigmoid", "exp"))
    inputs = gated.Inputs(x, r, b, state, Flags.of(reset, mask))
    op = ("slstm", IMPLEMENTATIONS, implementation)
    gates: dict[str, Any] = dict(forget_gate=forget_gate, stabilize=stabilize)
    uses = frozenset() if stabilize else frozenset({NO_STABILIZER})
    return gated.run(*op, inputs, SLSTMState, reverse=reverse, uses=uses, **gates)
