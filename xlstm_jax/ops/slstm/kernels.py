"""The op `slstm` by the kernels of TPUs and GPUs: what they refuse, and the call."""

import functools

from xlstm_jax.cells.slstm import SLSTMState
from xlstm_jax.ops import dispatch, gated
from xlstm_jax.ops.dispatch import Call
from xlstm_jax.typing import Array, Float


def tpu_refusal(call: Call) -> str | None:
    """Why the TPU's kernels cannot serve a call, or None."""
    reason = dispatch.refuses_tpu_kernel(call)
    if reason is not None:
        return reason
    from pallas_kernels import tiles

    return tiles.slstm_refusal(call.K, call.dtype)


def triton_refusal(call: Call) -> str | None:
    """Why the Triton kernels cannot serve a call, or None."""
    return dispatch.refuses_triton_kernel(call)


def slstm_tpu(inputs: gated.Inputs, forget_gate: str):
    """By Pallas kernels; see `_slstm`."""
    from pallas_kernels import tiles
    from pallas_kernels.slstm import vjp

    kernel = functools.partial(vjp.slstm, vmem_bytes=tiles.slstm_vmem_bytes())
    return _slstm(kernel, inputs, forget_gate)


def slstm_triton(inputs: gated.Inputs, forget_gate: str):
    """By Triton kernels; see `_slstm`."""
    from pallas_kernels.slstm import triton_vjp

    return _slstm(triton_vjp.slstm, inputs, forget_gate)


def _slstm(
    kernel, inputs: gated.Inputs, forget_gate: str
) -> tuple[Float[Array, "B T H K"], SLSTMState]:
    """The op `slstm`. A donated state is updated in place where T = 1."""
    x, r, b, state, (reset, mask) = inputs
    h, leaves = kernel(x, r, b, tuple(state), reset, mask, forget_gate=forget_gate)
    return h, SLSTMState(*leaves)
