"""One step of attention, for decoding: writes one slot of the cache and leaves the others alone."""

import jax.numpy as jnp

from xlstm_jax.cells.attention import AttentionState, attention_step
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.attention.arguments import Inputs, Options
from xlstm_jax.ops.flags import Flags
from xlstm_jax.typing import Array, Float


def decode_refusal(call: dispatch.Call) -> str | None:
    """Why `attention_decode` does not support the call, or None."""
    if not isinstance(call.T, int) or call.T != 1:
        return f"it computes one step, not T={call.T}"


def attention_decode(
    inputs: Inputs, state: AttentionState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], AttentionState]:
    """The op `attention` for T = 1. The state equals that of the recurrence bit for bit.

    The recurrence copies the cache: with a mask, it selects between the full old and new cache.
    """
    reset, mask = flags.valid_reset, flags.mask
    if reset is not None:
        k, v, length = state
        k, v = (jnp.where(reset[:, :, None, None], 0, a) for a in (k, v))
        state = AttentionState(k, v, jnp.where(reset[:, 0], 0, length))
    q, k, v = (flags.zero_masked(a)[:, 0] for a in inputs)
    state, y = attention_step(
        state,
        q,
        k,
        v,
        window=options.window,
        num_sinks=options.num_sinks,
        rotary=options.rotary,
        mask=None if mask is None else mask[:, 0],
    )
    return flags.zero_masked(y[:, None]).astype(inputs.v.dtype), state
