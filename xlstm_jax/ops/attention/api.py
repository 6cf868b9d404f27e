"""Causal softmax attention over a sequence: one signature, several implementations."""

from typing import Any

import jax.numpy as jnp

from xlstm_jax.cells.attention import (
    ROTARY,
    AttentionState,
    Rotary,
    attention_init,
    attention_scan,
)
from xlstm_jax.cells.logspace import common_dtype
from xlstm_jax.errors import ArgumentError
from xlstm_jax.ops import dispatch, over_time
from xlstm_jax.ops.attention.arguments import Inputs, Options
from xlstm_jax.ops.attention.blockwise import attention_blockwise, attention_parallel
from xlstm_jax.ops.attention.decode import attention_decode, decode_refusal
from xlstm_jax.ops.attention.kernels import (
    attention_cudnn,
    attention_splash,
    cudnn_refusal,
    splash_refusal,
)
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.typing import Array, Flag, Float

SIGNATURE = over_time.Signature(
    "attention",
    Inputs._make(("B T H K", "B T groups K", "B T groups V")),
    AttentionState._make(("B groups S K", "B groups S V", "B")),
    "B T H V",
)


def _recurrent(inputs: Inputs, state: AttentionState, flags: Flags, options: Options):
    return attention_scan(
        *inputs,
        state,
        **flags._asdict(),
        window=options.window,
        num_sinks=options.num_sinks,
        rotary=options.rotary,
    )


def _in_blocks(call: dispatch.Call) -> str | None:
    return dispatch.symbolic_refusal(call, "T")


# Ordered by preference: "auto" selects the first that supports the call.
IMPLEMENTATIONS = {
    "decode": Implementation(attention_decode, decode_refusal),
    "cudnn": Implementation(attention_cudnn, cudnn_refusal),
    "splash": Implementation(attention_splash, splash_refusal),
    "blockwise": Implementation(attention_blockwise, _in_blocks),
    "parallel": Implementation(attention_parallel, _in_blocks),
    "recurrent": Implementation(_recurrent),
}


@on_any_mesh((SIGNATURE.y, AttentionState._make(("B H _ _", "B H _ _", "B"))))
def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T groups K"],
    v: Float[Array, "B T groups V"],
    state: AttentionState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    window: int,
    num_sinks: int = 0,
    rotary: Rotary = ROTARY,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H V"], AttentionState]:
    """Causal softmax attention over the newest positions of a document and its first (sinks).

    Args:
        q: queries, without rotation; the op applies 1/sqrt(K).
        k, v: keys and values, each shared by the consecutive heads of a group.
        state: cache of `num_sinks + window` slots before the first step; None: an empty one.
        reset: where True, a document begins; it sees no earlier positions.
        mask: where False, the state stays bit-identical, y is 0 and resets are ignored.
        window: number of positions that a query sees, its own included.
        num_sinks: first positions of a document that all of its queries see.
        rotary: position embedding; `Rotary(base=0)` is none.
        implementation: a name of `ops.implementations("attention")`, or "auto".

    Returns y in the dtype of v, and the cache after the last step, in the dtype of k.

    Raises:
        ValueError: inconsistent shapes, heads that groups do not divide, or an unknown
            implementation.
        NotImplementedError: the implementation does not support this call; gives the reason.
    """
    for name, value, least in (("window", window, 1), ("num_sinks", num_sinks, 0)):
        if value < least:
            raise ArgumentError(f"attention: `{name}` must be at least {least}, got {value}.")
    over_time.check_groups("attention", "k", k, "q", q)
    options = Options(window, num_sinks, rotary, is_initial=state is None)

    def init(inputs: Inputs, dtype: jnp.dtype) -> AttentionState:
        B, _, groups, K = inputs.k.shape
        # A cache in the dtype of activations; float64 arguments make all of it float64.
        dtype = dtype if dtype == jnp.float64 else inputs.k.dtype
        sizes = B, num_sinks + window, groups, K, inputs.v.shape[-1]
        return attention_init(*sizes, dtype)

    inputs, flags = Inputs(q, k, v), Flags.of(reset, mask)
    return over_time.run(
        SIGNATURE,
        IMPLEMENTATIONS,
        implementation,
        inputs,
        state,
        flags,
        init=init,
        facts=_facts(inputs, state, flags, options),
        options=options,
    )


def _facts(
    inputs: Inputs, state: AttentionState | None, flags: Flags, options: Options
) -> dict[str, Any]:
    """Facts of a call besides its sizes."""
    T = inputs.q.shape[1] if inputs.q.ndim > 1 else 0
    uses = {name for name, flag in flags._asdict().items() if flag is not None}
    uses |= {"state"} if state is not None else set()
    if not (isinstance(T, int) and T <= options.window):  # otherwise every query sees all before
        uses |= {"window", "num_sinks"} if options.num_sinks else {"window"}
    return dict(uses=frozenset(uses), dtype=common_dtype(*(x.dtype for x in inputs)))
