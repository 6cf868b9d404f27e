"""Where one document of a packed sequence ends and the next begins."""

import jax.numpy as jnp

from xlstm_jax.ops.sharded.halo import previous_tokens
from xlstm_jax.ops.sharded.shard_map import map_shards, sharding_axes
from xlstm_jax.typing import Array, Bool, Int


def document_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where the state is to be reset: the id differs from the one before.

    A sequence's first token is no such place, whatever padding precedes it: the state is initial
    there, or it was given on purpose.

    Args:
        segment_ids: 0 is padding, documents count from 1.

    On a mesh that shards the sequence a device sends its last id and whether it has a token.
    """
    B, T = segment_ids.shape
    axes = sharding_axes("T", T)

    def local(segment_ids):
        id_before = jnp.zeros_like(segment_ids[:, 0])
        has_begun = id_before > 0
        if axes:
            id_before, has_begun = previous_tokens(segment_ids, axes)
        before = jnp.concatenate([id_before[:, None], segment_ids[:, :-1]], axis=1)
        begins = jnp.concatenate([has_begun[:, None], segment_ids[:, :-1] != 0], axis=1)
        return (segment_ids != before) & (jnp.cumsum(begins, axis=1) > 0)

    if not axes:
        return local(segment_ids)
    return map_shards(local, (segment_ids,), ("B T",), "B T", {"B": B, "T": T})
