"""Document boundaries of packed sequences."""

import jax.numpy as jnp

from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.ops.sharded.halo import previous_tokens
from xlstm_jax.ops.sharded.shard_map import map_shards, sharding_axes
from xlstm_jax.typing import Array, Bool, Int


@on_any_mesh("B T")
def document_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """The `reset` of a packed sequence: True where the segment id differs from the previous one.

    The first token of a sequence is not a reset, even after padding: the state before it is either
    the initial one or passed by the caller on purpose.

    Args:
        segment_ids: 0 is padding, documents count from 1.

    On a mesh that shards the sequence, devices all-gather their last id and whether they have a
    token.
    """
    B, T = segment_ids.shape
    axes = sharding_axes("T", T)

    def local(segment_ids):
        last_id = jnp.zeros_like(segment_ids[:, 0])
        has_begun = last_id > 0
        if axes:
            last_id, has_begun = previous_tokens(segment_ids, axes)
        previous = jnp.concatenate([last_id[:, None], segment_ids[:, :-1]], axis=1)
        is_token = jnp.concatenate([has_begun[:, None], segment_ids[:, :-1] != 0], axis=1)
        # The running count is 0 up to and including the first token, which is not a reset.
        return (segment_ids != previous) & (jnp.cumsum(is_token, axis=1) > 0)

    if not axes:
        return local(segment_ids)
    return map_shards(local, (segment_ids,), ("B T",), "B T", {"B": B, "T": T})
