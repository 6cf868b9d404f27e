"""The order of windows: a permutation per epoch, as a pure function of (seed, epoch, position).

A full permutation reads windows from everywhere, which remote storage answers slowly. The order
"blocks" has two levels: blocks of consecutive windows are permuted, and then the windows within
every set of blocks. A reader that keeps the blocks of one set reads each block once.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt64

from xlstm_jax.data import hashing

Shuffle = Literal["auto", "full", "blocks", "none"]

PAGE = 1024
"""Positions of a page, whose windows are computed together: NumPy takes as long for one batch."""

# Folded into the key of an epoch.
_BLOCKS, _PARTIAL, _SETS = (np.full(1, number, np.uint64) for number in (1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Order:
    """Maps positions in an endless stream of epochs to windows."""

    size: int  # windows
    seeds: tuple[int, ...]  # any integers; every bit counts
    shuffle: Shuffle
    block: int  # windows
    set_size: int  # blocks

    def window(self, position: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "N"]:
        """The windows at positions; every epoch has each window once."""
        page, offset = np.divmod(position, PAGE)
        window = np.empty_like(position)
        for number in np.unique(page):  # those of a batch are consecutive
            mine = page == number
            window[mine] = _page(self, int(number))[offset[mine]]
        return window

    def _window(self, position: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "N"]:
        epoch, index = np.divmod(position, self.size)
        if self.shuffle == "none":
            return index
        # One key per position, because their epochs may differ.
        keys = hashing.fold(hashing.key(*self.seeds), epoch.astype(np.uint64))
        fits_in_set = self.size <= self.block * self.set_size
        if self.shuffle == "full" or (self.shuffle == "auto" and fits_in_set):
            return hashing.permute(index, self.size, keys)
        return self._in_blocks(index, keys)

    def _in_blocks(
        self, index: Int64[np.ndarray, "N"], keys: UInt64[np.ndarray, "N"]
    ) -> Int64[np.ndarray, "N"]:
        full, rest = divmod(self.size, self.block)  # blocks, and windows of a partial one
        # Position of the partial block, at random among the full ones; after them without one.
        partial = np.full_like(index, full)
        if rest:
            partial = hashing.below(hashing.fold(keys, _PARTIAL), full + 1)
        missing = self.block - rest if rest else 0
        number = self._padded(index, partial, missing) // (self.block * self.set_size)
        first = number * self.set_size  # block of the set
        in_set = partial - first  # negative or beyond the set if it is in another one
        before = self._without(first, partial, missing)  # windows of the sets before it
        last = np.minimum(first + self.set_size, full + (rest > 0))
        num_windows = self._without(last, partial, missing) - before
        within = np.empty_like(index)
        set_keys = hashing.fold(hashing.fold(keys, _SETS), number.astype(np.uint64))
        for count in np.unique(num_windows):  # at most four: full, last, and with a partial block
            chosen = np.flatnonzero(num_windows == count)
            local = (index - before)[chosen]
            within[chosen] = hashing.permute(local, int(count), set_keys[chosen])
        block, offset = np.divmod(self._padded(within, in_set, missing), self.block)
        block += first
        shifted = block - (block > partial)
        is_full = block != partial if rest else np.ones(len(block), np.bool_)
        permuted = np.full_like(block, full)
        block_keys = hashing.fold(keys, _BLOCKS)[is_full]
        permuted[is_full] = hashing.permute(shifted[is_full], full, block_keys)
        return permuted * self.block + offset

    def _padded(self, index, partial, missing: int) -> Int64[np.ndarray, "N"]:
        """Indices as if the partial block, at position `partial`, were full."""
        after = index >= partial * self.block + (self.block - missing)
        return index + missing * (after & (partial >= 0))

    def _without(self, block, partial, missing: int) -> Int64[np.ndarray, "N"]:
        """Windows of the first `block` blocks, of which that at position `partial` is partial."""
        return block * self.block - missing * (partial < block)


@functools.lru_cache(maxsize=64)
def _page(order: Order, number: int) -> Int64[np.ndarray, "page"]:
    """The windows at the positions of a page."""
    positions = np.arange(number * PAGE, (number + 1) * PAGE, dtype=np.int64)
    return order._window(positions)
