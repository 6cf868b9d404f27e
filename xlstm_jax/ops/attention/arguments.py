"""Argument groups of the op `attention`, and the positions of its queries and keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.attention import (
    AttentionState,
    Rotary,
    is_visible,
    slot_of,
    slot_positions,
)
from xlstm_jax.ops.flags import Flags
from xlstm_jax.typing import Array, Bool, Float, Int


class Inputs(NamedTuple):
    """Queries, keys and values, without rotation."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T groups K"]
    v: Float[Array, "B T groups V"]


class Options(NamedTuple):
    """Static facts of a call."""

    window: int
    num_sinks: int
    rotary: Rotary
    is_initial: bool  # without a cache
    block_size: int | None = None


class Positions(NamedTuple):
    """Positions in their documents, and the running count of resets, which identifies documents.

    Keys of the cache come before those of the call.
    """

    query: Int[Array, "B T"]
    key: Int[Array, "B S"]  # -1: no key
    query_document: Int[Array, "B T"] | None  # None: one document
    key_document: Int[Array, "B S"] | None

    def visible(self, queries: slice, keys: slice, options: Options) -> Bool[Array, "B Tq Sk"]:
        """Whether queries see keys, both given as ranges."""
        query, key = self.query[:, queries, None], self.key[:, None, keys]
        visible = is_visible(query, key, options.window, options.num_sinks)
        if self.query_document is None or self.key_document is None:
            return visible
        same = self.query_document[:, queries, None] == self.key_document[:, None, keys]
        return visible & same

    def is_far(self, queries: slice, keys: slice, window: int) -> Bool[Array, "B Tq Sk"]:
        """Whether a key is outside of the window, and seen only as a sink."""
        return self.query[:, queries, None] - self.key[:, None, keys] >= window


class Sequence(NamedTuple):
    """Rotated queries and keys, and values; those of the cache come first."""

    q: Float[Array, "B T H K"]
    q_near: Float[Array, "B T H K"] | None  # rotated for sinks outside of the window
    k: Float[Array, "B groups S K"]
    v: Float[Array, "B groups S V"]
    positions: Positions


def with_cache(inputs: Inputs, state: AttentionState, flags: Flags, options: Options) -> Sequence:
    """The queries of a call, and all keys that they may see."""
    q, k, v = (flags.zero_masked(a) for a in inputs)
    query, document = _count(state.length, flags, q.shape[1])
    key = query if flags.mask is None else jnp.where(flags.mask, query, -1)
    k, v = (jnp.moveaxis(a, 2, 1) for a in (options.rotary(k, query), v))
    key_document = document
    if not options.is_initial:
        slots = slot_positions(state.length, options.window, options.num_sinks)
        k, v = (jnp.concatenate(a, axis=2) for a in ((state.k, k), (state.v, v)))
        key = jnp.concatenate([slots, key], axis=1)
        if document is not None:
            key_document = jnp.concatenate([jnp.zeros_like(slots), document], axis=1)
    near = None
    if options.num_sinks:
        near = options.rotary(q, jnp.minimum(query, options.num_sinks + options.window - 1))
    positions = Positions(query, key, document, key_document)
    return Sequence(options.rotary(q, query), near, k, v, positions)


def _count(length: Int[Array, "B"], flags: Flags, T: int):
    """Positions "B T" after `length` earlier ones, and documents "B T" or None."""
    index = jnp.arange(T, dtype=length.dtype)[None]
    if flags.mask is not None:  # masked positions are not counted
        index = jnp.cumsum(flags.mask, axis=1, dtype=length.dtype) - 1
    reset = flags.valid_reset
    if reset is None:
        return index + length[:, None], None
    index = jnp.broadcast_to(index, reset.shape)
    start = jax.lax.cummax(jnp.where(reset, index, -length[:, None]), axis=1)
    return index - start, jnp.cumsum(reset, axis=1, dtype=length.dtype)


def cache_after(sequence: Sequence, state: AttentionState, options: Options) -> AttentionState:
    """The cache after the last position: new positions are written into their slots."""
    positions, T = sequence.positions, sequence.q.shape[1]
    key = positions.key[:, -T:]
    last, written = state.length, key >= 0
    if positions.query_document is None:
        old_k, old_v = state.k, state.v
    else:
        written &= positions.query_document == positions.query_document[:, -1:]
        is_reset = positions.query_document[:, -1] > 0
        last = jnp.where(is_reset, 0, last)
        old_k, old_v = (jnp.where(is_reset[:, None, None, None], 0, a) for a in state[:2])
    length = jnp.maximum(jnp.max(jnp.where(written, key, -1), axis=1) + 1, last)
    written &= is_visible(length[:, None] - 1, key, options.window, options.num_sinks)
    slot = slot_of(key, options.window, options.num_sinks)
    slot = jnp.where(written, slot, state.k.shape[2])  # out of bounds: dropped
    batch = jnp.arange(slot.shape[0])[:, None]
    k, v = (
        old.at[batch, :, slot].set(
            jnp.moveaxis(new[:, :, -T:], 1, 2).astype(old.dtype), mode="drop"
        )
        for old, new in ((old_k, sequence.k), (old_v, sequence.v))
    )
    return AttentionState(k, v, length)
