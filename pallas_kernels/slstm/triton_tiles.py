"""Block sizes of the sLSTM Triton kernels by chip, head width and dtype."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import common, gpu
from pallas_kernels.gpu import divisor
from pallas_kernels.hardware import ARCHITECTURES

BATCH_BLOCK = 16
"""Sequences per program: the smallest M of a tensor-core matmul."""


class Tile(NamedTuple):
    """Block sizes and launch options of one kernel."""

    warps: int
    stages: int
    block: int = 0  # output cells per product; 0: all, with resident weights
    inner: int = 0  # input cells per product
    cached: int = 0  # forward, streamed weights: output cells with resident weights

    @property
    def resident(self) -> bool:
        """Whether all recurrent weights of a head stay in shared memory."""
        return not self.block


class Tiles(NamedTuple):
    """The tiles of one call."""

    width: int  # padded width of the heads
    forward: Tile
    backward: Tile


def choose(B: int, T: int, H: int, K: int, dtype: jnp.dtype) -> Tiles:
    """The tiles of a call on the current chip, or on the target of `common.compiled_for`."""
    del B, T, H
    width = gpu.width(K, common.lanes())
    return Tiles(width, forward(width, dtype), backward(width, dtype))


def refusal(K: int, dtype: jnp.dtype) -> str | None:
    """Why no kernel supports a call, or None; any head width is supported."""
    del K
    return common.dtype_refusal(jnp.dtype(dtype))


def forward(K: int, dtype: jnp.dtype) -> Tile:
    """The tile of the forward kernel, for K from `gpu.width`."""
    is_float32 = jnp.dtype(dtype).itemsize == 4
    if _fits(8 * K * K * (4 if is_float32 else 1)):
        return _resident(K)
    block = divisor(K, 64)
    # A cached block is multiplied by all K cells in one product, whose sizes are powers of two.
    is_power_of_two = K & (K - 1) == 0
    is_cached = is_power_of_two and not is_float32 and _fits(8 * K * block + (24 << 10))
    return Tile(8, 2, block, min(block, 32 if is_float32 else 64), block if is_cached else 0)


def backward(K: int, dtype: jnp.dtype) -> Tile:
    """As `forward`; the gradients of the gates also pass through shared memory."""
    is_float32 = jnp.dtype(dtype).itemsize == 4
    if _fits(K * K * (42 if is_float32 else 12)):
        # In float32, loads ahead of their use spill registers on sm_100.
        return _resident(K)._replace(stages=1 if is_float32 else 2)
    # On sm_120, blocks of 128 cells spill registers at K = 256.
    block = divisor(K, 64 if is_float32 or gpu.current_chip() == "sm_120" else 128)
    return Tile(8, 3, block, divisor(K, 32 if is_float32 else 128))


def _fits(size: int) -> bool:
    """Whether `size` bytes and 10 KiB of other data fit the shared memory of a multiprocessor."""
    chip = gpu.current_chip()
    if common.interpreter() or chip is None:
        return size <= 1 << 12
    return size + (10 << 10) <= ARCHITECTURES[chip].shared_bytes


def _resident(K: int) -> Tile:
    return Tile(8 if K >= 64 else 4, 2)
