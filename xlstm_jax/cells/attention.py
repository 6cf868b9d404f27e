"""Causal softmax attention as a recurrence: its state is a cache of keys and values of fixed size.

A query sees the newest `window` positions of its document and its first `num_sinks` positions (sink
tokens). Full attention is a window as long as the sequence. Sources: Vaswani et al. 2017,
arXiv:1706.03762; rotary positions Su et al. 2021, arXiv:2104.09864; grouped heads Ainslie et al.
2023, arXiv:2305.13245; sinks Xiao et al. 2023, arXiv:2309.17453.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax.cells.logspace import NEG, exact_einsum, state_dtype
from xlstm_jax.cells.time import scan_time, vary_like
from xlstm_jax.typing import Array, Bool, Flag, Float, Int, Size


class AttentionState(NamedTuple):
    """Cache of one attention layer: S = num_sinks + window slots; the initial state is zeros.

    Sinks have the first slots; other positions overwrite the slot of the oldest in the window.
    Slots of positions that do not exist yet are 0. Keys and values have the dtype of activations.
    """

    k: Float[Array, "B groups S K"]  # rotated
    v: Float[Array, "B groups S V"]
    length: Int[Array, "B"]  # positions of the document so far


export.register_namedtuple_serialization(AttentionState, serialized_name="xlstm_jax.AttentionState")


class Rotary(NamedTuple):
    """Rotary position embedding of the first `dim` features of a head (None: all); base 0: none."""

    base: float = 10_000.0
    dim: int | None = None

    def __call__(
        self, x: Float[Array, "*batch heads K"], position: Int[Array, "*batch"]
    ) -> Float[Array, "*batch heads K"]:
        """x, rotated by its position."""
        if not self.base:
            return x
        dim, wide = self.dim or x.shape[-1], state_dtype(x)
        frequency = self.base ** (-jnp.arange(0, dim, 2, dtype=wide) / dim)
        angle = position.astype(wide)[..., None, None] * jnp.expand_dims(
            frequency, tuple(range(position.ndim + 1))
        )
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        # Pairs are the two halves of the rotated features, as in the published checkpoints.
        a, b, rest = jnp.split(x.astype(wide), (dim // 2, dim), axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(
            x.dtype
        )


ROTARY = Rotary()


def attention_init(
    batch_size: Size,
    num_slots: int,
    groups: int,
    qk_dim: int,
    v_dim: int,
    dtype: DTypeLike = jnp.float32,
) -> AttentionState:
    """The initial state: zeros."""
    return AttentionState(
        jnp.zeros((batch_size, groups, num_slots, qk_dim), dtype),
        jnp.zeros((batch_size, groups, num_slots, v_dim), dtype),
        jnp.zeros(batch_size, jnp.int32),
    )


def slot_of(position: Int[Array, "..."], window: int, num_sinks: int) -> Int[Array, "..."]:
    """The slot of the cache into which a position is written."""
    return jnp.where(
        position < num_sinks, position, num_sinks + (position - num_sinks) % max(window, 1)
    )


def slot_positions(length: Int[Array, "B"], window: int, num_sinks: int) -> Int[Array, "B S"]:
    """The position in every slot of a cache after `length` positions; -1 if it is empty."""
    slot = jnp.arange(num_sinks + window, dtype=length.dtype)[None]
    newest = length[:, None] - 1
    # The newest position that maps to the slot; sinks have one position only.
    rounds = jnp.where(slot < num_sinks, 0, (newest - slot) // window)
    return jnp.where(newest >= slot, slot + rounds * window, -1)


def is_visible(
    query: Int[Array, "..."], key: Int[Array, "..."], window: int, num_sinks: int
) -> Bool[Array, "..."]:
    """Whether a query at a position sees a key at a position of the same document; -1 is no key."""
    return (key >= 0) & (key <= query) & ((query - key < window) | (key < num_sinks))


def attention_step(
    state: AttentionState,
    q: Float[Array, "B H K"],
    k: Float[Array, "B groups K"],
    v: Float[Array, "B groups V"],
    *,
    window: int,
    num_sinks: int = 0,
    rotary: Rotary = ROTARY,
    mask: Bool[Array, "B"] | None = None,
) -> tuple[AttentionState, Float[Array, "B H V"]]:
    """One time step, in the argument order of `jax.lax.scan`.

    Args:
        state: after step t-1.
        q: query, without rotation, of every head.
        k, v: key and value, shared by the consecutive heads of a group.
        window: number of positions that a query sees, its own included.
        num_sinks: first positions of a document that all of its queries see.
        rotary: rotation of queries and keys. To a sink, a query is never farther than the cache is
            long.
        mask: where False, nothing is written, the length stays, and y is arbitrary.

    Returns the state after step t, and y_t in float32 or wider.
    """
    position = state.length
    slot, count = slot_of(position, window, num_sinks), 1
    if mask is not None:
        slot = jnp.where(mask, slot, state.k.shape[2])  # out of bounds: dropped
        count = mask.astype(position.dtype)
    keys = _write(state.k, rotary(k, position), slot)
    values = _write(state.v, v, slot)
    state = AttentionState(keys, values, position + count)
    key_position = slot_positions(state.length, window, num_sinks)
    scores = _scores(q, keys, position, key_position, window, num_sinks, rotary)
    visible = is_visible(position[:, None], key_position, window, num_sinks)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, NEG), axis=-1)
    y = exact_einsum("BGRS,BGSV->BGRV", weights, values.astype(weights.dtype))
    return state, y.reshape(*q.shape[:2], v.shape[-1])


def _write(
    cache: Float[Array, "B groups S K"], new: Float[Array, "B groups K"], slot: Int[Array, "B"]
) -> Float[Array, "B groups S K"]:
    """The cache with one slot replaced; a slot out of bounds is dropped."""
    # On CPUs, XLA fuses a scatter of one index into all readers of the cache, each of which then
    # copies the cache. Hence one index for every group, and at least two.
    copies = 2 if new.shape[:2] == (1, 1) else 1
    slots = jnp.broadcast_to(slot[:, None, None], (*new.shape[:2], copies))
    new = jnp.repeat(new[:, :, None].astype(cache.dtype), copies, axis=2)
    # Mapped over batch and groups, it needs no communication where these are sharded.
    write = jax.vmap(jax.vmap(lambda cache, new, slots: cache.at[slots].set(new, mode="drop")))
    return write(cache, new, slots)


def _scores(q, keys, position, key_position, window: int, num_sinks: int, rotary: Rotary):
    """Scaled products of each query with all slots, "B groups R S"; R heads share a group."""
    (B, H, K), groups, wide = q.shape, keys.shape[1], state_dtype(q, keys)

    def with_keys(position):
        rotated = rotary(q, position).astype(wide).reshape(B, groups, H // groups, K)
        return exact_einsum("BGRK,BGSK->BGRS", rotated * K**-0.5, keys.astype(wide))

    scores = with_keys(position)
    if not num_sinks:
        return scores
    is_far = position[:, None] - key_position >= window
    near = with_keys(jnp.minimum(position, num_sinks + window - 1))
    return jnp.where(is_far[:, None, None], near, scores)


def attention_scan(
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
) -> tuple[Float[Array, "B T H V"], AttentionState]:
    """The recurrence over a sequence; `reset` and `mask` as in `scan_time`.

    Returns y in the dtype of v, and the state after the last step.
    """
    if state is None:
        sizes = k.shape[0], num_sinks + window, k.shape[2], k.shape[-1], v.shape[-1]
        state = attention_init(*sizes, k.dtype)
    state = vary_like(state, (q, k, v, reset, mask))

    def step(state, inputs):
        return attention_step(state, *inputs, window=window, num_sinks=num_sinks, rotary=rotary)

    y, state = scan_time(step, state, (q, k, v), reset=reset, mask=mask)
    return y.astype(v.dtype), state
