"""Sizes of the sLSTM's Triton kernels by chip, head width and dtype."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import common, gpu
from pallas_kernels.gpu import divisor
from pallas_kernels.hardware import ARCHITECTURES

ROWS = 16
"""Rows of the batch of one program: a product has no fewer."""


class Tile(NamedTuple):
    """How one kernel computes a head."""

    warps: int
    stages: int
    block: int = 0  # cells computed together; 0: all of them, their weights on the multiprocessor
    inner: int = 0  # cells that they are multiplied with together
    kept: int = 0  # forward: cells whose weights are on the multiprocessor all the same

    @property
    def resident(self) -> bool:
        """Whether all recurrent weights of a head stay on the multiprocessor."""
        return not self.block


class Tiles(NamedTuple):
    """How one call is computed."""

    width: int  # heads are padded to it
    forward: Tile
    backward: Tile


def choose(B: int, T: int, H: int, K: int, dtype: jnp.dtype) -> Tiles:
    """The tiles of one call on the current chip, or that of `common.compiled_for`."""
    del B, T, H
    width = gpu.width(K, common.lanes())
    return Tiles(width, forward(width, dtype), backward(width, dtype))


def refusal(K: int, dtype: jnp.dtype) -> str | None:
    """Why no kernel supports a call, or None; heads of any width are supported."""
    del K
    return common.refused_dtype(jnp.dtype(dtype))


def forward(K: int, dtype: jnp.dtype) -> Tile:
    """For heads of a width that `gpu.width` gives."""
    wide = jnp.dtype(dtype).itemsize == 4
    if _fits(8 * K * K * (4 if wide else 1)):
        return _resident(K)
    block = divisor(K, 64)
    whole = K & (K - 1) == 0  # what is kept is one product with all cells, so a power of two
    kept = block if whole and not wide and _fits(8 * K * block + (24 << 10)) else 0
    return Tile(8, 2, block, min(block, 32 if wide else 64), kept)


def backward(K: int, dtype: jnp.dtype) -> Tile:
    """As `forward`; the gradients of the gates pass through shared memory as well."""
    wide = jnp.dtype(dtype).itemsize == 4
    if _fits(K * K * (42 if wide else 12)):
        return _resident(K)
    block = divisor(K, 64 if wide else 128)
    return Tile(8, 3, block, min(block, 32 if wide else 128))


def _fits(size: int) -> bool:
    """Whether so many bytes, and a few more, stay on the multiprocessor."""
    chip = gpu.current_chip()
    if common.interpreter() or chip is None:
        return size <= 1 << 12
    return size + (10 << 10) <= ARCHITECTURES[chip].shared_bytes


def _resident(K: int) -> Tile:
    return Tile(8 if K >= 64 else 4, 2)
