"""The op `slstm` by the kernels of TPUs and GPUs: what they refuse, and the call."""

import jax
import jax.numpy as jnp

from xlstm_jax.cells.slstm import SLSTMState, slstm_init
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.dispatch import Call
from xlstm_jax.typing import Array, Bool, Float


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


def slstm_tpu(x, r, b=None, state=None, **options):
    """By Pallas kernels; see `_slstm`."""
    from pallas_kernels.slstm import backends

    return _slstm(backends.tpu(), x, r, b, state, **options)


def slstm_triton(x, r, b=None, state=None, **options):
    """By Triton kernels; see `_slstm`."""
    from pallas_kernels.slstm import backends

    return _slstm(backends.triton(), x, r, b, state, **options)


def _slstm(
    kernels,
    x: Float[Array, "B T 4 H K"],
    r: Float[Array, "H K 4 K"],
    b: Float[Array, "H 4 K"] | None,
    state: SLSTMState | None,
    *,
    reset: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    forget_gate: str = "sigmoid",
    reverse: bool = False,
) -> tuple[Float[Array, "B T H K"], SLSTMState]:
    """The op `slstm`; arguments as there. A donated state is updated in place where T = 1."""
    from pallas_kernels.slstm import api

    B, _, _, H, K = x.shape
    state = slstm_init(B, H, K) if state is None else state
    leaves = state.c, state.n, state.h, state.m
    if reverse:
        x, reset, mask = jax.tree.map(lambda a: jnp.flip(a, 1), (x, reset, mask))
    h, leaves = api.slstm(kernels, x, r, b, leaves, reset, mask, forget_gate=forget_gate)
    return jnp.flip(h, 1) if reverse else h, SLSTMState(*leaves)
