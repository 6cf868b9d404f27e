"""Attention by kernels that come with JAX: cuDNN on a GPU, splash attention on a TPU.

They compute scores of the queries and keys of one call, so a cache must be empty before it. Their
gradients are first-order and in reverse mode only.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import common
from xlstm_jax.cells.attention import AttentionState
from xlstm_jax.cells.logspace import common_dtype, state_dtype
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.attention.arguments import Inputs, Options, Sequence, cache_after, with_cache
from xlstm_jax.ops.flags import Flags
from xlstm_jax.typing import Array, Float

BLOCK_SIZES = (512, 256, 128)
"""Positions in a block of splash attention: the largest that divides the padded length."""


def cudnn_refusal(call: dispatch.Call) -> str | None:
    """Why `attention_cudnn` does not support the call, or None."""
    if (reason := _common_refusal(call, "gpu")) is not None:
        return reason
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN computes with bfloat16 and float16, not with {call.dtype}"
    if call.K != call.V or call.K % 8 or call.K > 256:
        return (
            "cuDNN needs queries, keys and values of one width, a multiple of 8 up to 256, got "
            f"K={call.K} and V={call.V}"
        )
    if call.uses & {"reset", "mask"} and not call.named:
        # JAX passes no segment ids to cuDNN. Memory of the mask grows with the square of T.
        return "resets and masks need a mask of all pairs of positions; name 'cudnn' to use one"
    return _probe_cudnn(call)


def _probe_cudnn(call: dispatch.Call) -> str | None:
    """JAX's error for this environment and GPU, such as a missing cuDNN, or None."""
    x = jax.ShapeDtypeStruct((call.B, call.T, call.H, call.K), call.dtype)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", is_causal=True)
    try:
        jax.eval_shape(attend, x, x, x)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).partition("\n")[0].rstrip(".")


def splash_refusal(call: dispatch.Call) -> str | None:
    """Why `attention_splash` does not support the call, or None."""
    if (reason := _common_refusal(call, "tpu")) is not None:
        return reason
    if {"mask", "window"} <= call.uses:
        return "masked positions do not count towards the window; pass a window of at least T"
    if call.dtype == jnp.float32 and common.interpreter():
        return None  # as accurate as other implementations
    if call.dtype != jnp.bfloat16:
        return f"splash attention multiplies in bfloat16, not in {call.dtype}"


def _common_refusal(call: dispatch.Call, platform: str) -> str | None:
    if (reason := dispatch.symbolic_refusal(call, "BT")) is not None:
        return reason
    is_interpreted = platform == "tpu" and call.named and common.interpreter()
    if call.platform != platform and not is_interpreted:
        return f"it runs on a {platform.upper()}, not on {call.platform!r}"
    if call.check_vma:
        return "kernels do not declare how results vary; pass check_vma=False to `jax.shard_map`"
    if "state" in call.uses:
        return "it starts from an empty cache; pass state=None"
    if "num_sinks" in call.uses:
        return "sinks outside of the window need another rotation; pass num_sinks=0"


def attention_cudnn(
    inputs: Inputs,
    state: AttentionState,
    flags: Flags,
    options: Options,
    *,
    implementation: str = "cudnn",
) -> tuple[Float[Array, "B T H V"], AttentionState]:
    """The op `attention` by `jax.nn.dot_product_attention`, whose `implementation` is passed on."""
    sequence, mask, window = with_cache(inputs, state, flags, options), None, None
    if any(flag is not None for flag in flags):
        mask = sequence.positions.visible(slice(None), slice(None), options)[:, None]
    elif options.window < inputs.q.shape[1]:
        window = (options.window - 1, 0)  # positions before and after the query
    attend: Any = jax.nn.dot_product_attention
    q, k, v = _operands(sequence)
    y = attend(
        q,
        jnp.moveaxis(k, 1, 2),
        jnp.moveaxis(v, 1, 2),
        mask=mask,
        is_causal=True,
        local_window_size=window,
        implementation=implementation,
    )
    y = flags.zero_masked(y)
    return y.astype(inputs.v.dtype), cache_after(sequence, state, options)


def attention_splash(
    inputs: Inputs, state: AttentionState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], AttentionState]:
    """The op `attention` by splash attention, which skips blocks outside of the window."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (_, T, H, K), sequence = inputs.q.shape, with_cache(inputs, state, flags, options)
    q, k, v = _operands(sequence)
    q = (q.astype(state_dtype(q)) * K**-0.5).astype(q.dtype)
    # Padded keys are later than all queries.
    length = common.round_up(T, common.LANES)
    q, k, v = (common.pad(a, 2, length) for a in (jnp.moveaxis(q, 2, 1), k, v))
    block = next(size for size in BLOCK_SIZES if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    # A computed mask, of which only blocks are stored; a window as long as T is causal.
    mask = splash.LocalMask((length, length), (min(options.window, T) - 1, 0), offset=0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(**blocks),
        interpret=common.interpreter(),
    )
    ids = _segment_ids(sequence, flags)
    if ids is not None:
        ids = common.pad(ids, 1, length)
        ids = splash.SegmentIds(ids, ids)
    y: Any = jax.vmap(kernel)(q, k, v, ids)
    y = flags.zero_masked(jnp.moveaxis(y[:, :, :T], 1, 2))
    return y.astype(inputs.v.dtype), cache_after(sequence, state, options)


def _operands(sequence: Sequence) -> tuple[Array, Array, Array]:
    """Rotated queries and keys, and values, in one dtype, which the kernels need."""
    arrays = sequence.q, sequence.k, sequence.v
    dtype = common_dtype(*(a.dtype for a in arrays))
    q, k, v = (a.astype(dtype) for a in arrays)
    return q, k, v


def _segment_ids(sequence: Sequence, flags: Flags) -> Array | None:
    """Numbers "B T" that are equal where a query may see a key; None: all of them."""
    ids = sequence.positions.query_document
    if flags.mask is None:
        return ids
    ids = jnp.zeros(flags.mask.shape, jnp.int32) if ids is None else ids
    return jnp.where(
        flags.mask, ids, -1
    )  # masked positions see each other, as none may see nothing
