"""The order of windows: a permutation per epoch, as a pure function of (seed, epoch, position).

A full permutation reads windows from everywhere, which remote storage answers slowly. The order
"blocks" has two levels: blocks of consecutive windows are permuted, and then the windows within
every set of blocks. A reader that keeps the blocks of one set reads each block once.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt64

from xlstm_jax.data import hashing

Shuffle = Literal["auto", "full", "blocks", "none"]

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
        # The partial block takes a random place among the full ones, beyond them if there is none.
        place = hashing.below(hashing.fold(keys, _PARTIAL), full + 1) if rest else full + 0 * index
        missing = self.block - rest if rest else 0
        number = self._padded(index, place, missing) // (self.block * self.set_size)
        first = number * self.set_size  # block of the set
        in_set = place - first  # place of the partial block, maybe outside of the set
        before = self._without(first, place, missing)  # windows of the sets before it
        last = np.minimum(first + self.set_size, full + (rest > 0))
        num_windows = self._without(last, place, missing) - before
        within = np.empty_like(index)
        set_keys = hashing.fold(hashing.fold(keys, _SETS), number.astype(np.uint64))
        for count in np.unique(num_windows):  # at most four: full, last, and with a partial block
            rows = np.flatnonzero(num_windows == count)
            within[rows] = hashing.permute((index - before)[rows], int(count), set_keys[rows])
        block, offset = np.divmod(self._padded(within, in_set, missing), self.block)
        block += first
        shifted = block - (block > place)
        is_full = block != place if rest else np.ones(len(block), np.bool_)
        permuted = np.full_like(block, full)
        block_keys = hashing.fold(keys, _BLOCKS)[is_full]
        permuted[is_full] = hashing.permute(shifted[is_full], full, block_keys)
        return permuted * self.block + offset

    def _padded(self, index, place, missing: int) -> Int64[np.ndarray, "N"]:
        """Indices as if the partial block, the one at `place`, were full."""
        after = index >= place * self.block + (self.block - missing)
        return index + missing * (after & (place >= 0))

    def _without(self, block, place, missing: int) -> Int64[np.ndarray, "N"]:
        """Windows of the first `block` blocks, of which the one at `place` is partial."""
        return block * self.block - missing * (place < block)
