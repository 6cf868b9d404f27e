"""The op `mlstm` by the kernels of TPUs and GPUs: what they refuse, and the call."""

import jax.numpy as jnp

from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.dispatch import Call
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.typing import Array, Float


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


def mlstm_tpu(x: Inputs, state: MLSTMState, flags: Flags, options: Options):
    """By Pallas kernels; see `_mlstm`."""
    from pallas_kernels.mlstm import backends

    return _mlstm(backends.tpu(), x, state, flags, options)


def mlstm_triton(x: Inputs, state: MLSTMState, flags: Flags, options: Options):
    """By Triton kernels; see `_mlstm`."""
    from pallas_kernels.mlstm import backends

    return _mlstm(backends.triton(), x, state, flags, options)


def _mlstm(
    kernels, x: Inputs, state: MLSTMState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """The op `mlstm`. A donated state is updated in place where T = 1."""
    from pallas_kernels.mlstm import api

    dtype = jnp.result_type(x.q, x.k, x.v)
    q, k, v = (a.astype(dtype) for a in x[:3])
    keywords = flags._asdict() | options._asdict()
    leaves = state.C, state.n, state.m
    h, leaves = api.mlstm(kernels, q, k, v, x.i, x.f, leaves, **keywords)
    return h.astype(x.v.dtype), MLSTMState(*leaves)
