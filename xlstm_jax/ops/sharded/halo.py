"""Inputs that precede a device's shard of the sequence, received from other devices (the halo).

Call within a `shard_map`; `axes` are the mesh axes over which the sequence is sharded, in order.
"""

import jax
import jax.numpy as jnp

from xlstm_jax.typing import Array, Bool, Float, Int


def previous_tokens(
    segment_ids: Int[Array, "B T"], axes: tuple[str, ...]
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """The last segment id before this shard, and whether a token (not padding) precedes it."""
    rank = jax.lax.axis_index(axes)
    has_token = jnp.any(segment_ids != 0, axis=1)
    last_ids, have_tokens = jax.lax.all_gather((segment_ids[:, -1], has_token), axes)
    is_before = jnp.arange(len(last_ids)) < rank
    has_begun = jnp.any(is_before[:, None] & have_tokens, axis=0)
    # For the first shard any id will do: no document has begun.
    return last_ids[jnp.maximum(rank - 1, 0)], has_begun


def state_from_neighbor(
    state: Float[Array, "B taps F"], shard_last: Float[Array, "B taps F"], axes: tuple[str, ...]
) -> tuple[Float[Array, "B taps F"], Float[Array, "B taps F"]]:
    """The last inputs before this shard and after the last one, if shards are as long as a state.

    `state` precedes the first shard; `shard_last` are the last inputs of this one.
    """
    count, rank = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    last = jnp.where(rank == count - 1, shard_last, 0)
    received = jax.lax.ppermute(shard_last, axes, [(j, j + 1) for j in range(count - 1)])
    # `last` is zero on all devices but one, so the psum broadcasts it.
    return jnp.where(rank == 0, state, received), jax.lax.psum(last, axes)


def states_from_all_shards(
    state: Float[Array, "B taps F"],
    shard_last: Float[Array, "B taps F"],
    num_replaced: Int[Array, "B"],
    axes: tuple[str, ...],
) -> tuple[Float[Array, "B taps F"], Float[Array, "B taps F"]]:
    """As `state_from_neighbor`, for shards that replace only `num_replaced` inputs of a state."""
    rank = jax.lax.axis_index(axes)
    shards, counts = jax.lax.all_gather((shard_last, num_replaced), axes)
    before = after = state
    size = state.shape[1]
    for j, (inputs, n) in enumerate(zip(shards, counts, strict=True)):
        # The state shifts by n positions and takes the last n of the shard's inputs.
        index = jnp.arange(size)[None] + n[:, None]
        older = jnp.take_along_axis(after, jnp.minimum(index, size - 1)[..., None], axis=1)
        after = jnp.where((index < size)[..., None], older, inputs)
        before = jnp.where(j < rank, after, before)
    return before, after
