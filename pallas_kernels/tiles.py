"""Sizes of tiles by chip and head width: one table, one rule, and what fits a chip's memory.

The table is written by `experiments/benchmarks/tpu_tiles.py`, which compiles candidates for every
chip without having one and ranks them by scheduled bundles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import common

MIB = 1 << 20


class Chip(NamedTuple):
    """What of a TPU core a tile depends on."""

    device_kind: str  # what jax calls it
    vmem_bytes: int  # of one core
    matrix_unit: int  # side of one matrix unit


CHIPS = {
    "v4": Chip("TPU v4", 16 * MIB, 128),
    "v5e": Chip("TPU v5 lite", 128 * MIB, 128),
    "v5p": Chip("TPU v5", 64 * MIB, 128),
    "v6e": Chip("TPU v6 lite", 128 * MIB, 256),
    "v7x": Chip("TPU7x", 64 * MIB, 256),
}


class Tile(NamedTuple):
    """How an mLSTM kernel cuts a sequence."""

    chunk: int
    strip: int
    chunks_per_block: int
    vmem_bytes: int | None = None


def mlstm(K, V, dtype, T, chunk_size) -> Tile:
    lanes = common.lanes()
    chunk = chunk_size or min(256, common.round_up(T, lanes))
    N = -(-T // chunk)
    return Tile(chunk, min(128, lanes, chunk), 2 if N % 2 == 0 else 1)
