"""Attention by products of blocks of queries with all keys that they may see.

Scores of a block are rematerialized in the backward pass: memory grows with T times the block size.
"""

import functools

import jax
import jax.numpy as jnp

from xlstm_jax.cells.attention import AttentionState
from xlstm_jax.cells.logspace import NEG, state_dtype
from xlstm_jax.ops.attention.arguments import Inputs, Options, Sequence, cache_after, with_cache
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.mlstm.products import product
from xlstm_jax.typing import Array, Float

BLOCK_SIZE = 128
"""Queries in a block by default."""


def attention_blockwise(
    inputs: Inputs, state: AttentionState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], AttentionState]:
    """The op `attention`, in blocks of queries."""
    sequence = with_cache(inputs, state, flags, options)
    T = inputs.q.shape[1]
    size = options.block_size or BLOCK_SIZE
    blocks = [
        attend(sequence, slice(start, min(start + size, T)), flags, options, inputs.v.dtype)
        for start in range(0, T, size)
    ]
    y = flags.zero_masked(jnp.concatenate(blocks, axis=1))
    return y.astype(inputs.v.dtype), cache_after(sequence, state, options)


def attention_parallel(
    inputs: Inputs, state: AttentionState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], AttentionState]:
    """The op `attention`, all queries at once."""
    options = options._replace(block_size=inputs.q.shape[1])
    return attention_blockwise(inputs, state, flags, options)


def attend(
    sequence: Sequence, queries: slice, flags: Flags, options: Options, dtype: jnp.dtype
) -> Float[Array, "B Tq H V"]:
    """The result of a range of queries, float32 or wider; operands of products have `dtype`."""
    keys = slice(
        _first_key(sequence, queries, flags, options), _num_cached(sequence) + queries.stop
    )
    visible = sequence.positions.visible(queries, keys, options)
    is_far = None
    if options.num_sinks:
        is_far = sequence.positions.is_far(queries, keys, options.window)
    near = None if sequence.q_near is None else sequence.q_near[:, queries]
    core = jax.checkpoint(functools.partial(_attend, dtype), prevent_cse=False)
    return core(
        sequence.q[:, queries],
        near,
        sequence.k[:, :, keys],
        sequence.v[:, :, keys],
        visible,
        is_far,
    )


def _num_cached(sequence: Sequence) -> int:
    return sequence.k.shape[2] - sequence.q.shape[1]


def _first_key(sequence: Sequence, queries: slice, flags: Flags, options: Options) -> int:
    """The first key that a query of the block may see."""
    # Masked positions do not count, so the window may reach far back; sinks of any document may be
    # anywhere.
    if flags.mask is not None or options.num_sinks or not options.is_initial:
        return 0
    return max(0, queries.start - options.window + 1)


def _attend(dtype: jnp.dtype, q, near, k, v, visible, is_far) -> Float[Array, "B Tq H V"]:
    wide, (B, T, H, K), groups = state_dtype(q, k, v), q.shape, k.shape[1]
    k, v = k.astype(wide), v.astype(wide)

    def scores_of(q: Array) -> Array:
        q = q.astype(wide).reshape(B, T, groups, H // groups, K) * K**-0.5
        q = jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(B, groups, -1, K)
        return product("BGTK,BGSK->BGTS", dtype, q, k).reshape(B, groups, -1, T, k.shape[2])

    scores = scores_of(q)
    if near is not None:
        scores = jnp.where(is_far[:, None, None], scores_of(near), scores)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, NEG), axis=-1)
    y = product("BGTS,BGSV->BGTV", dtype, weights.reshape(B, groups, -1, k.shape[2]), v)
    return jnp.transpose(y.reshape(B, groups, -1, T, v.shape[-1]), (0, 3, 1, 2, 4)).reshape(
        B, T, H, -1
    )
