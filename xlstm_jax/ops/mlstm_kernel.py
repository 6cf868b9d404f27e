"""The op `mlstm` by the kernels of TPUs and GPUs: what they refuse, and the call."""

import jax.numpy as jnp

from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.dispatch import Call
from xlstm_jax.typing import Array, Bool, Float


def tpu_refusal(call: Call) -> str | None:
    """Why the TPU's kernels cannot serve a call, or None."""
    reason = dispatch.refuses_tpu_kernel(call)
    if reason is not None:
        return reason
    from pallas_kernels.mlstm import backends

    return backends.tpu().refusal(call.K, call.V, call.dtype, call.chunk_size)


def triton_refusal(call: Call) -> str | None:
    """Why the Triton kernels cannot serve a call, or None."""
    reason = dispatch.refuses_triton_kernel(call)
    if reason is not None:
        return reason
    from pallas_kernels.mlstm import backends

    return backends.triton().refusal(call.K, call.V, call.dtype, call.chunk_size)


def mlstm_tpu(q, k, v, i, f, state, **options):
    """By Pallas kernels; see `_mlstm`."""
    from pallas_kernels.mlstm import backends

    return _mlstm(backends.tpu(), q, k, v, i, f, state, **options)


def mlstm_triton(q, k, v, i, f, state, **options):
    """By Triton kernels; see `_mlstm`."""
    from pallas_kernels.mlstm import backends

    return _mlstm(backends.triton(), q, k, v, i, f, state, **options)


def _mlstm(
    kernels,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    i: Float[Array, "B T H"],
    f: Float[Array, "B T H"],
    state: MLSTMState,
    *,
    reset: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    **options,
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """The op `mlstm`; arguments as there. A donated state is updated in place where T = 1."""
    from pallas_kernels.mlstm import api

    dtype, out_dtype = jnp.result_type(q, k, v), v.dtype
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    memory = state.C, state.n, state.m
    h, memory = api.mlstm(kernels, q, k, v, i, f, memory, reset=reset, mask=mask, **options)
    return h.astype(out_dtype), MLSTMState(*memory)
