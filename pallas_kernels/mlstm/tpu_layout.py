"""Layout of the mLSTM TPU kernels: heads narrower than a tile of lanes share one tile.

Queries and keys of G adjacent heads are the G K lanes of one block of `B T HK`. Their matrix
memories are stacked to one `GK V` array, a reshape of `B H K V`. A product over all lanes is that
of one head if one of its operands has zeros in the lanes of the other heads, and the other operand
is finite.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import common

MAX_HEADS = 4
"""Most heads in a block: the kernels are unrolled over them."""


class Heads(NamedTuple):
    """The heads of one block, and their padded widths."""

    num: int  # G
    K: int
    V: int

    @classmethod
    def of(cls, lanes: int, H: int, q: jax.Array, v: jax.Array) -> "Heads":
        """The heads in a block of q `B T HK` and v `B T HV`, which have padded widths."""
        K, V = q.shape[2] // H, v.shape[2] // H
        return cls(num_sharing(K, lanes), K, V)

    @property
    def qk_width(self) -> int:
        """Lanes of q, k and n in a block, and rows of C."""
        return self.num * self.K

    @property
    def v_width(self) -> int:
        """Lanes of v and h in a block."""
        return self.num * self.V

    @property
    def indices(self) -> range:
        """Index of each head within a block."""
        return range(self.num)

    def qk_lanes(self, head: int) -> slice:
        """Lanes of q, k and n of one head, which are also its rows of C."""
        return slice(head * self.K, (head + 1) * self.K)

    def v_lanes(self, head: int) -> slice:
        """Lanes of v and h of one head."""
        return slice(head * self.V, (head + 1) * self.V)

    def only(self, x: jax.Array, head: int) -> jax.Array:
        """`L GK` with zeros in the lanes of the other heads."""
        if self.num == 1:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        lanes = self.qk_lanes(head)
        return jnp.where((lane >= lanes.start) & (lane < lanes.stop), x, jnp.zeros_like(x))

    def join(self, parts: list[jax.Array]) -> jax.Array:
        """`L GK` with the lanes of each head from its own array `L GK`."""
        joined = parts[0]
        for head, part in enumerate(parts[1:], 1):
            joined = self._from(head, part, joined)
        return joined

    def store(self, ref: jax.Ref, positions: slice, x: jax.Array, head: int) -> None:
        """Stores the lanes of one head of x, `L GK`; heads are stored in order."""
        if head:
            x = self._from(head, x, ref[0, positions].astype(x.dtype))
        ref[0, positions] = x.astype(ref.dtype)

    def _from(self, head: int, x: jax.Array, earlier: jax.Array) -> jax.Array:
        """The lanes of `earlier` below those of a head, the others of x."""
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(lane >= self.qk_lanes(head).start, x, earlier)


def num_sharing(K: int, lanes: int) -> int:
    """G, the number of heads of width K that can share a tile of lanes."""
    return lanes // K if lanes % K == 0 and lanes // K <= MAX_HEADS else 1


def padded_widths(H: int, K: int, V: int, lanes: int) -> tuple[int, int]:
    """Widths that the heads are padded to: multiples of the lanes, or none for K if heads share."""
    heads = num_sharing(K, lanes)
    shares = heads > 1 and H % heads == 0
    return K if shares else common.round_up(K, lanes), common.round_up(V, lanes)
