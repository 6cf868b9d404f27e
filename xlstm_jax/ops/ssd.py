"""The state space of Mamba-2 over a sequence.

The chunkwise form computes positions of a chunk by masked products of queries and keys, and carries
a matrix memory from chunk to chunk. Source: Dao & Gu 2024, arXiv:2405.21060, section 6.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.ssd import SSDState, ssd_init, ssd_scan
from xlstm_jax.ops import chunks, dispatch, over_time
from xlstm_jax.ops.checks import check_chunk_size
from xlstm_jax.ops.cpu import materialize
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.gradient import times_unit
from xlstm_jax.ops.mlstm.products import product
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.typing import Array, Flag, Float

CHUNK_SIZE = 64
"""Positions per chunk by default."""


class Inputs(NamedTuple):
    """Arguments of the op besides state and flags."""

    x: Float[Array, "B T H V"]
    dt: Float[Array, "B T H"]
    A: Float[Array, "H"]
    B: Float[Array, "B T groups K"]
    C: Float[Array, "B T groups K"]
    D: Float[Array, "H"] | None


SIGNATURE = over_time.Signature(
    "ssd",
    Inputs._make(("B T H V", "B T H", "H", "B T groups K", "B T groups K", "H")),
    SSDState._make(("B H K V",)),
    "B T H V",
)


def _recurrent(inputs: Inputs, state: SSDState, flags: Flags, chunk_size: int | None):
    del chunk_size
    return ssd_scan(*inputs, state, **flags._asdict())


def _chunkwise(inputs: Inputs, state: SSDState, flags: Flags, chunk_size: int | None):
    x, dt, A, B, C, D = inputs
    wide = state.h.dtype
    x, dt, B, C = (flags.zero_masked(a) for a in (x, dt, B, C))
    dt = dt.astype(wide)
    L = min(chunk_size or CHUNK_SIZE, x.shape[1])
    # Weights and scores, L x L per chunk, are rematerialized in the backward pass.
    core = jax.checkpoint(functools.partial(_core, x.dtype, L), prevent_cse=False)
    v, log_decay = dt[..., None] * x.astype(wide), dt * A.astype(wide)[None, None]
    y, h = core(C, B, v, log_decay, state.h, flags.valid_reset)
    if D is not None:
        y = y + D.astype(wide)[None, None, :, None] * x.astype(wide)
    return flags.zero_masked(y).astype(inputs.x.dtype), SSDState(h)


def _core(dtype: jnp.dtype, L: int, q, k, v, log_decay, h, reset):
    """The memory that q reads and into which k writes v, with products of operands in `dtype`.

    Z is N * B * groups. The R heads of a group share q and k, so their values, and their memories,
    are the columns of one matrix wherever a product does not depend on the decay.
    """
    (B, T, H, V), (groups, K), wide = v.shape, q.shape[2:], h.dtype
    R, weights = H // groups, chunks.decays(log_decay, reset, L)
    N = weights.across.shape[0]
    within, read, write, across, prefix = (
        w.reshape(N * B * groups, R, *w.shape[3:]) for w in weights
    )
    read, write, by_position = (jnp.moveaxis(a, 1, 2) for a in (read, write, prefix))

    def in_chunks(a):  # B T groups ... to Z L ...
        return jnp.moveaxis(chunks.split(a, L), 3, 2).reshape(-1, L, *a.shape[3:])

    q, k = (in_chunks(a).astype(wide) for a in (q, k))
    v = times_unit(in_chunks(v.reshape(B, T, groups, R, V)), -by_position)
    scores = product("ZLK,ZSK->ZLS", dtype, q, k)[:, None] * within
    of_heads = jnp.moveaxis(v, 2, 1).reshape(-1, L, V)
    y = product("ZLS,ZSV->ZLV", dtype, scores.reshape(-1, L, L), of_heads)
    y = jnp.moveaxis(y.reshape(-1, R, L, V), 1, 2)
    written = (write[..., None] * v).reshape(-1, L, R * V)
    new = product("ZLK,ZLV->ZKV", dtype, k, written).reshape(-1, K, R, V)
    end = prefix[..., -1]
    new = jnp.moveaxis(times_unit(jnp.moveaxis(new, 2, 1), end), 1, 2)
    by_chunk = jax.tree.map(
        lambda a: a.reshape(N, B * groups, *a.shape[1:]), (times_unit(across, end), new)
    )

    def step(h, chunk):
        across, new = chunk
        return across[:, None, :, None] * h + new, h

    h = jnp.swapaxes(h.reshape(B * groups, R, K, V), 1, 2)
    h, starts = jax.lax.scan(step, materialize(h), by_chunk)
    inter = product("ZLK,ZKV->ZLV", dtype, q, starts.reshape(-1, K, R * V))
    y = times_unit(y + read[..., None] * inter.reshape(y.shape), by_position)
    y = jnp.moveaxis(y.reshape(N, B, groups, L, R, V), 2, 3)
    return (
        chunks.join(y, T).reshape(B, T, H, V),
        jnp.swapaxes(h, 1, 2).reshape(B, H, K, V),
    )


# Ordered by preference: "auto" selects the first that supports the call.
IMPLEMENTATIONS = {
    "chunkwise": Implementation(_chunkwise, lambda call: dispatch.symbolic_refusal(call, "T")),
    "recurrent": Implementation(_recurrent),
}


@on_any_mesh((SIGNATURE.y, SIGNATURE.state))
def ssd(
    x: Float[Array, "B T H V"],
    dt: Float[Array, "B T H"],
    A: Float[Array, "H"],
    B: Float[Array, "B T groups K"],
    C: Float[Array, "B T groups K"],
    D: Float[Array, "H"] | None = None,
    state: SSDState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H V"], SSDState]:
    """State space with one decay per head (arXiv:2405.21060).

    h_t = exp(dt A) h_{t-1} + dt B x',  y_t = C h_t + D x.

    Args:
        x: input of every head.
        dt: step size, above 0.
        A: continuous transition, below 0.
        B, C: key and query, each shared by the consecutive heads of a group.
        D: weight of the skip connection; None: no skip connection.
        state: before the first step; None is the initial state, zeros.
        reset: where True, the state before this position is replaced by the initial one.
        mask: where False, the state stays bit-identical, y is 0 and resets are ignored.
        chunk_size: positions per chunk; changes speed only.
        implementation: a name of `ops.implementations("ssd")`, or "auto".

    Returns y in the dtype of x, and the state after the last step, float32 or wider.

    Raises:
        ValueError: inconsistent shapes, heads that groups do not divide, or an unknown
            implementation.
        NotImplementedError: the implementation does not support this call; gives the reason.
    """
    check_chunk_size("ssd", chunk_size)
    over_time.check_groups("ssd", "B", B, "x", x)
    if implementation == "auto" and x.ndim > 1 and x.shape[1] == 1:
        implementation = "recurrent"  # a chunk of one step only adds work
    return over_time.run(
        SIGNATURE,
        IMPLEMENTATIONS,
        implementation,
        Inputs(x, dt, A, B, C, D),
        state,
        Flags.of(reset, mask),
        init=_init,
        chunk_size=chunk_size,
    )


def _init(inputs: Inputs, dtype: jnp.dtype) -> SSDState:
    x, B = inputs.x, inputs.B
    return ssd_init(x.shape[0], x.shape[2], B.shape[-1], x.shape[-1], dtype)
