"""What precedes a device's shard of the sequence, received from other devices.

Call within a `shard_map`; `axes` are the mesh axes over which the sequence is sharded, in order.
"""

import jax
import jax.numpy as jnp

from xlstm_jax.typing import Array, Bool, Float, Int


def previous_tokens(
    segment_ids: Int[Array, "B T"], axes: tuple[str, ...]
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """The last segment id before this shard, and whether a token precedes the shard."""
    rank = jax.lax.axis_index(axes)
    has_token = jnp.any(segment_ids != 0, axis=1)
    last_ids, have_tokens = jax.lax.all_gather((segment_ids[:, -1], has_token), axes)
    is_before = jnp.arange(len(last_ids)) < rank
    has_begun = jnp.any(is_before[:, None] & have_tokens, axis=0)
    # It does not matter what precedes the first shard: no document has begun.
    return last_ids[jnp.maximum(rank - 1, 0)], has_begun


def nearest_state(
    state: Float[Array, "B taps F"], own: Float[Array, "B taps F"], axes: tuple[str, ...]
) -> tuple[Float[Array, "B taps F"], Float[Array, "B taps F"]]:
    """Last inputs before this shard and after the last one, where every shard fills a state.

    Args:
        state: before the first shard.
        own: the last inputs of this shard.
        axes: as above.
    """
    count, rank = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    last = jnp.where(rank == count - 1, own, 0)
    sent = jax.lax.ppermute(own, axes, [(j, j + 1) for j in range(count - 1)])
    return jnp.where(rank == 0, state, sent), jax.lax.psum(last, axes)


def shifted_states(
    state: Float[Array, "B taps F"],
    own: Float[Array, "B taps F"],
    number: Int[Array, "B"],
    axes: tuple[str, ...],
) -> tuple[Float[Array, "B taps F"], Float[Array, "B taps F"]]:
    """As `nearest_state`, where a shard may replace only `number` inputs of a state."""
    rank = jax.lax.axis_index(axes)
    shards, numbers = jax.lax.all_gather((own, number), axes)
    before = after = state
    size = state.shape[1]
    for j, (inputs, n) in enumerate(zip(shards, numbers, strict=True)):
        # The last n of the shard's inputs follow; the ones before them are zeros.
        index = jnp.arange(size)[None] + n[:, None]
        older = jnp.take_along_axis(after, jnp.minimum(index, size - 1)[..., None], axis=1)
        after = jnp.where((index < size)[..., None], older, inputs)
        before = jnp.where(j < rank, after, before)
    return before, after
