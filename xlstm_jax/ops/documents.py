"""Where one document of a packed row ends and the next begins."""

import functools

import jax
import jax.numpy as jnp

from xlstm_jax.ops.sharded import cut_by, per_device
from xlstm_jax.typing import Array, Bool, Int


def document_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where memory is to be emptied: the id differs from the one before.

    A row's first token is no such place, whatever padding precedes it: memory is empty there, or it
    was given on purpose.

    Args:
        segment_ids: 0 is padding, documents count from 1.

    On a mesh that cuts time a device tells the others its last id and whether a token precedes it.
    """
    B, T = segment_ids.shape
    spans = cut_by("T", T)
    if not spans:
        nothing = jnp.zeros((B,), segment_ids.dtype)
        return _starts(segment_ids, nothing, nothing > 0)
    run = functools.partial(_span, spans)
    return per_device(run, (segment_ids,), ("B T",), "B T", {"B": B, "T": T})


def _span(axes: tuple[str, ...], segment_ids):
    """One device's span of time, within a `shard_map`."""
    rank = jax.lax.axis_index(axes)
    has_token = jnp.any(segment_ids != 0, axis=1)
    last_ids, have_tokens = jax.lax.all_gather((segment_ids[:, -1], has_token), axes)
    is_before = jnp.arange(len(last_ids)) < rank
    has_begun = jnp.any(is_before[:, None] & have_tokens, axis=0)
    # Of the first span it does not matter what precedes it: nothing has begun.
    return _starts(segment_ids, last_ids[jnp.maximum(rank - 1, 0)], has_begun)


def _starts(segment_ids, id_before: Int[Array, "B"], has_begun: Bool[Array, "B"]):
    before = jnp.concatenate([id_before[:, None], segment_ids[:, :-1]], axis=1)
    begins = jnp.concatenate([has_begun[:, None], segment_ids[:, :-1] != 0], axis=1)
    return (segment_ids != before) & (jnp.cumsum(begins, axis=1) > 0)
