"""Padding and packed sequences of recurrent layers, as masks and resets of the ops."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from xlstm_jax.errors import ArgumentError
from xlstm_jax.ops.flags import Flags
from xlstm_jax.typing import Array, Bool


def length_mask(lengths: ArrayLike | Sequence[int], B: int, T: int) -> Bool[Array, "B T"]:
    """True at the first `lengths` positions of each sequence.

    Raises:
        ArgumentError: `lengths` are not B integers, or one is not from 0 to T. Values are checked
            outside of transformations only, where they are known.
    """
    lengths = jnp.array(lengths)
    if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ArgumentError(
            f"lengths must have one integer for each of the {B} sequences, got shape "
            f"{lengths.shape} and dtype {lengths.dtype}; for padding elsewhere pass a mask."
        )
    if not isinstance(lengths, Tracer) and ((lengths < 0) | (lengths > T)).any():
        raise ArgumentError(
            f"lengths must be from 0 to T={T}, got {lengths.tolist()}; T is the number of "
            "positions of x, padding included."
        )
    return jnp.arange(T)[None] < lengths[:, None]


def backward_reset(flags: Flags) -> Bool[Array, "B T"] | None:
    """The resets of a run from the end: True at the last valid position of each packed sequence."""
    reset = flags.reset
    if reset is None:
        return None
    T = reset.shape[1]
    if flags.mask is None:
        return jnp.pad(reset[:, 1:], ((0, 0), (0, 1)))
    # The first valid position after each; T if none follows. Masked resets are not looked up.
    valid = jnp.where(flags.mask, jnp.arange(T)[None], T)
    following = jax.lax.cummin(valid, axis=1, reverse=True)
    following = jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=T)
    starts = jnp.pad(reset, ((0, 0), (0, 1)))  # no sequence starts at T
    return jnp.take_along_axis(starts, following, axis=1)
