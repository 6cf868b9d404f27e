"""The op `slstm` by the kernels of TPUs and GPUs: what they refuse, and the call."""

from xlstm_jax.cells.slstm import SLSTMState
from xlstm_jax.ops import dispatch, gated
from xlstm_jax.ops.dispatch import Call
from xlstm_jax.typing import Array, Float


def tpu_refusal(call: Call) -> str | None:
    """Why the TPU's kernels cannot serve a call, or None."""
    reason = dispatch.refuses_tpu_kernel(call)
    if reason is not None:
        return reason
    from pallas_kernels.slstm import backends

    return backends.tpu().refusal(call.K, call.dtype)


def triton_refusal(call: Call) -> str | None:
    """Why the Triton kernels cannot serve a call, or None."""
    return dispatch.refuses_triton_kernel(call)


def slstm_tpu(inputs: gated.Inputs, forget_gate: str):
    """By Pallas kernels; see `_slstm`."""
    from pallas_kernels.slstm import backends

    return _slstm(backends.tpu(), inputs, forget_gate)


def slstm_triton(inputs: gated.Inputs, forget_gate: str):
    """By Triton kernels; see `_slstm`."""
    from pallas_kernels.slstm import backends

    return _slstm(backends.triton(), inputs, forget_gate)


def _slstm(
    kernels, inputs: gated.Inputs, forget_gate: str
) -> tuple[Float[Array, "B T H K"], SLSTMState]:
    """The op `slstm`. A donated state is updated in place where T = 1."""
    from pallas_kernels.slstm import api

    x, r, b, state, (reset, mask) = inputs
    h, leaves = api.slstm(kernels, x, r, b, tuple(state), reset, mask, forget_gate=forget_gate)
    return h, SLSTMState(*leaves)
