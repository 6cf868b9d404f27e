"""Sizes of the sLSTM's Triton kernels by chip, head width and dtype."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import common, gpu

ROWS = 16
"""Rows of the batch of one program: a product has no fewer."""


class Tile(NamedTuple):
    """How one kernel computes a head."""

    resident: bool  # all cells at once, the weights on the multiprocessor
    warps: int
    stages: int
    block: int = 0  # where not resident: cells computed together
    inner: int = 0  # and the cells that they are multiplied with together
    kept: int = 0  # forward: cells whose weights are on the multiprocessor all the same


def width(size: int, lanes: int) -> int:
    """The width that heads are filled up to: a power of two, beyond 64 a multiple of 64."""
    if size > 64:
        return common.round_up(size, 64)
    return max(min(lanes, 16), 1 << (size - 1).bit_length())


def forward(K: int, dtype: jnp.dtype) -> Tile:
    """For heads of a width that `width` gives."""
    wide = jnp.dtype(dtype).itemsize == 4
    if _fits(8 * K * K * (4 if wide else 1)):
        return _resident(K)
    block = _factor(K, 64)
    whole = K & (K - 1) == 0  # what is kept is one product with all cells, so a power of two
    kept = block if whole and not wide and _fits(8 * K * block + (24 << 10)) else 0
    return Tile(False, 8, 2, block, min(block, 32 if wide else 64), kept)


def backward(K: int, dtype: jnp.dtype) -> Tile:
    """As `forward`; the gradients of the gates pass through shared memory as well."""
    wide = jnp.dtype(dtype).itemsize == 4
    if _fits(K * K * (42 if wide else 12)):
        return _resident(K)
    block = _factor(K, 64 if wide else 128)
    return Tile(False, 8, 3, block, min(block, 32 if wide else 128))


def _fits(size: int) -> bool:
    """Whether so many bytes, and a few more, stay on the multiprocessor."""
    chip = gpu.current_chip()
    if common.interpreter() or chip is None:
        return size <= 1 << 12
    return size + (10 << 10) <= gpu.CHIPS[chip].shared_bytes


def _resident(K: int) -> Tile:
    return Tile(True, 8 if K >= 64 else 4, 2)


def _factor(size: int, most: int) -> int:
    """The largest power of two that divides `size`, up to `most`."""
    return min(size & -size, most)
