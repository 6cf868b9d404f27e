"""The gated delta rule over a sequence.

Within a chunk, the changes u that all positions make to the memory solve a triangular system (the
WY form); products with them replace the recurrence.

Source: Yang et al. 2024, arXiv:2412.06464, section 3.3, and arXiv:2406.06484.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.gated_delta import GatedDeltaState, gated_delta_init, gated_delta_scan
from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.ops import chunks, dispatch, over_time
from xlstm_jax.ops.checks import check_chunk_size
from xlstm_jax.ops.cpu import materialize
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.gradient import times_unit
from xlstm_jax.ops.mlstm.products import product
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.ops.triangular import unit_lower_inverse
from xlstm_jax.typing import Array, Flag, Float

CHUNK_SIZE = 64
"""Positions per chunk by default."""


class Inputs(NamedTuple):
    """Arguments of the op besides state and flags."""

    q: Float[Array, "B T groups K"]
    k: Float[Array, "B T groups K"]
    v: Float[Array, "B T H V"]
    log_decay: Float[Array, "B T H"]
    beta: Float[Array, "B T H"]


SIGNATURE = over_time.Signature(
    "gated_delta_rule",
    Inputs._make(("B T groups K", "B T groups K", "B T H V", "B T H", "B T H")),
    GatedDeltaState._make(("B H K V",)),
    "B T H V",
)


def _recurrent(inputs: Inputs, state: GatedDeltaState, flags: Flags, chunk_size: int | None):
    del chunk_size
    return gated_delta_scan(*inputs, state, **flags._asdict())


def _chunkwise(inputs: Inputs, state: GatedDeltaState, flags: Flags, chunk_size: int | None):
    wide, T = state.S.dtype, inputs.v.shape[1]
    L = min(chunk_size or CHUNK_SIZE, T)
    q, k, v, log_decay, beta = (flags.zero_masked(a).astype(wide) for a in inputs)
    R = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(a, R, axis=2) for a in (q * q.shape[-1] ** -0.5, k))
    # Weights and scores, L x L per chunk, are rematerialized in the backward pass.
    core = functools.partial(_core, inputs.v.dtype, L)
    core = jax.checkpoint(core, prevent_cse=False)
    h, S = core(q, k, v, log_decay, beta, state.S, flags.valid_reset)
    return flags.zero_masked(h).astype(inputs.v.dtype), GatedDeltaState(S)


def _core(dtype: jnp.dtype, L: int, q, k, v, log_decay, beta, S, reset):
    """Products take operands in `dtype`. Chunks, sequences and heads share the axis Z."""
    (B, T, H, V), K = v.shape, k.shape[-1]
    weights = chunks.decays(log_decay, reset, L)
    N = weights.across.shape[0]
    within, start, end, across, prefix = (a.reshape(-1, *a.shape[3:]) for a in weights)
    q, k, v, beta = (
        jnp.moveaxis(chunks.split(a, L), 3, 2).reshape(-1, L, *a.shape[3:]) for a in (q, k, v, beta)
    )
    q, written = times_unit(q, prefix), times_unit(k, -prefix)
    erased = beta[..., None] * times_unit(k, prefix)
    # (I + M) u = beta v - (beta start k) S: a change also corrects those before it.
    inverse = unit_lower_inverse(within * product("ZLK,ZSK->ZLS", dtype, erased, written))
    known = jnp.concatenate([beta[..., None] * v, start[..., None] * erased], axis=-1)
    u, w = jnp.split(exact_einsum("ZLS,ZSV->ZLV", inverse, known), (V,), axis=-1)
    keys = times_unit(end[..., None] * written, prefix[..., -1])
    across = times_unit(across, prefix[..., -1])

    def step(S, chunk):
        u, w, keys, across = chunk
        change = u - product("YLK,YKV->YLV", dtype, w, S)
        new = across[:, None, None] * S + product("YLK,YLV->YKV", dtype, keys, change)
        return new, (S, change)

    by_chunk = jax.tree.map(lambda a: a.reshape(N, B * H, *a.shape[1:]), (u, w, keys, across))
    S, (starts, changes) = jax.lax.scan(step, materialize(S.reshape(B * H, K, V)), by_chunk)
    starts, changes = (a.reshape(-1, *a.shape[2:]) for a in (starts, changes))
    scores = product("ZLK,ZSK->ZLS", dtype, q, written) * within
    h = product("ZLS,ZSV->ZLV", dtype, scores, changes)
    h = h + product("ZLK,ZKV->ZLV", dtype, start[..., None] * q, starts)
    h = chunks.join(jnp.moveaxis(h.reshape(N, B, H, L, V), 2, 3), T)
    return h, S.reshape(B, H, K, V)


# Ordered by preference: "auto" selects the first that supports the call.
IMPLEMENTATIONS = {
    "chunkwise": Implementation(_chunkwise, lambda call: dispatch.symbolic_refusal(call, "T")),
    "recurrent": Implementation(_recurrent),
}


@on_any_mesh((SIGNATURE.y, SIGNATURE.state))
def gated_delta_rule(
    q: Float[Array, "B T groups K"],
    k: Float[Array, "B T groups K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    state: GatedDeltaState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H V"], GatedDeltaState]:
    """A matrix memory that replaces the value stored under a key (arXiv:2412.06464).

    S_t = a S_{t-1} + beta k (v - a S_{t-1}' k)' with a = exp(log_decay),  h_t = S_t' q / sqrt(K).

    Args:
        q, k: queries and keys, each shared by the consecutive heads of a group. Keys have norm 1,
            or the memory may grow without bound.
        v: values.
        log_decay: log of the factor of the old memory, at most 0.
        beta: share of the stored value that is replaced, from 0 to 1.
        state: before the first step; None is the initial state, zeros.
        reset: where True, the state before this position is replaced by the initial one.
        mask: where False, the state stays bit-identical, h is 0 and resets are ignored.
        chunk_size: positions per chunk; changes speed only.
        implementation: a name of `ops.implementations("gated_delta_rule")`, or "auto".

    Returns h in the dtype of v, and the state after the last step, float32 or wider.

    Raises:
        ValueError: inconsistent shapes, heads that groups do not divide, or an unknown
            implementation.
        NotImplementedError: the implementation does not support this call; gives the reason.
    """
    check_chunk_size("gated_delta_rule", chunk_size)
    over_time.check_groups("gated_delta_rule", "k", k, "v", v)
    if implementation == "auto" and v.ndim > 1 and v.shape[1] == 1:
        implementation = "recurrent"  # a chunk of one step only adds work
    return over_time.run(
        SIGNATURE,
        IMPLEMENTATIONS,
        implementation,
        Inputs(q, k, v, log_decay, beta),
        state,
        Flags.of(reset, mask),
        init=_init,
        chunk_size=chunk_size,
    )


def _init(inputs: Inputs, dtype: jnp.dtype) -> GatedDeltaState:
    (batch_size, _, H, V), K = inputs.v.shape, inputs.k.shape[-1]
    return gated_delta_init(batch_size, H, K, V, dtype)
