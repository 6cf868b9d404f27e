"""Tiles of the mLSTM TPU kernels: a table by chip and head width, and an estimate of VMEM.

`experiments/benchmarks/tpu_tiles.py` writes the table, `tpu_tiles.json`: it compiles candidates
ahead of time for every chip and ranks them by scheduled bundles and HBM traffic.
"""

import json
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.hardware import MIB, TPUS
from pallas_kernels.mlstm.tpu_layout import num_sharing
from pallas_kernels.tpu import SCOPED_BYTES, current_chip


class Tile(NamedTuple):
    """How an mLSTM kernel tiles a sequence."""

    chunk: int  # L, positions in a chunk
    strip: int  # queries, and keys, of one tile of a chunk's L x L weights
    chunks_per_block: int  # chunks per grid step

    def vmem_limit(self, K: int, V: int, dtype: jnp.dtype) -> int | None:
        """The VMEM limit to compile with; None if the default is enough."""
        need = vmem_bytes(self, K, V, dtype)
        return None if need <= SCOPED_BYTES else common.round_up(need, MIB)


TABLE_FILE = pathlib.Path(__file__).with_suffix(".json")


def read_table(path: pathlib.Path = TABLE_FILE) -> dict[tuple[str, int, int], Tile]:
    """(chip, K, V) -> the best candidate for bfloat16."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        (entry["chip"], entry["K"], entry["V"]): Tile(*(entry[field] for field in Tile._fields))
        for entry in entries
    }


TABLE = read_table()
DEFAULT = {128: Tile(256, 128, 2), 256: Tile(512, 256, 1)}
"""Side of the MXU -> tile, for chips without table entries."""


def choose(
    K: int, V: int, dtype: jnp.dtype, T: int, chunk_size: int | None, chip: str | None = None
) -> Tile:
    """The tile of one call; `chip` None: the target or current chip.

    Raises:
        ValueError: the call is not supported; the message is that of `refusal`.
    """
    if reason := refusal(K, V, dtype, chunk_size, chip):
        raise ValueError(f"mlstm: {reason}.")
    lanes = common.lanes()
    longest = common.round_up(T, lanes)
    if common.interpreter():
        chunk = min(chunk_size or 2 * lanes, longest)
        return _blocks(Tile(chunk, lanes, 2), T)
    chip = chip or current_chip()
    tile = None if chip is None else _fitting(K, V, dtype, chunk_size, chip)
    assert tile is not None  # `refusal` has checked this
    if tile.chunk > longest:
        tile = Tile(longest, _strip(longest, tile.strip), tile.chunks_per_block)
    return _blocks(tile, T)


def refusal(
    K: int, V: int, dtype: jnp.dtype, chunk_size: int | None = None, chip: str | None = None
) -> str | None:
    """Why a call is not supported, naming sizes that are; None if it is."""
    chunk_reason = common.chunk_refusal(chunk_size, common.lanes())
    reason = common.dtype_refusal(jnp.dtype(dtype)) or chunk_reason
    if reason or common.interpreter():
        return reason
    chip = chip or current_chip()
    if chip is None:
        kind, known = jax.devices()[0].device_kind, ", ".join(TPUS)
        return f"VMEM of {kind!r} is unknown, known are {known}; use implementation='chunkwise'"
    if _fitting(K, V, dtype, chunk_size, chip) is not None:
        return None
    vmem = TPUS[chip].vmem_bytes
    smallest = Tile(chunk_size or common.LANES, common.LANES, 1)
    need = vmem_bytes(smallest, K, V, dtype)
    reason = (
        f"heads of K={K}, V={V} need {need / MIB:.1f} MiB with chunks of {smallest.chunk}, "
        f"a {chip} has {vmem / MIB:.0f} MiB of VMEM"
    )
    fits = None if chunk_size is None else _fitting(K, V, dtype, None, chip)
    if fits is not None:
        return f"{reason}; chunk_size={fits.chunk} fits"
    smallest = Tile(common.LANES, common.LANES, 1)
    widths = range(common.LANES, 8192, common.LANES)
    width = max(w for w in widths if vmem_bytes(smallest, w, w, dtype) <= vmem)
    return f"{reason}; K = V = {width} fits: use more heads"


def vmem_bytes(tile: Tile, K: int, V: int, dtype: jnp.dtype) -> int:
    """An upper bound on the VMEM of the backward kernel, which needs more than the forward kernel.

    Blocks are double-buffered. The compiler's own temporaries were measured by lowering the limit
    until compilation failed: at most 0.55 of the blocks in bfloat16 and 0.85 in float32 (jaxlib
    0.10.2, libtpu 0.0.42).
    """
    heads = num_sharing(K, common.LANES)
    K, V = (common.round_up(size, common.LANES) for size in (K, V))
    item = jnp.dtype(dtype).itemsize
    positions = tile.chunk * tile.chunks_per_block
    tokens = positions * ((4 * K + 4 * heads * V) * item + heads * 12 * 4)
    states = tile.chunks_per_block * (K * V * item + 8 * 4 * K) + 4 * K * V + 2 * 8 * 4 * K
    weights = heads * tile.chunk * (tile.chunk + tile.strip) // 2 * item
    with_temporaries = 1.55 if item == 2 else 1.85
    return round(2 * (tokens + states) * with_temporaries) + weights


def _fitting(K, V, dtype, chunk_size, chip) -> Tile | None:
    """The table's tile, or the largest smaller one that fits the chip's VMEM."""
    best = _nearest(chip, K, V)
    if jnp.dtype(dtype) == jnp.float32:
        # A float32 product takes six passes: the start of a block is negligible, code size is not.
        best = best._replace(chunks_per_block=1)
    chunk, max_blocks = best.chunk, best.chunks_per_block
    if chunk_size is not None:
        max_blocks = min(max_blocks, max(1, chunk * max_blocks // chunk_size))
        chunk = chunk_size
    smallest = common.LANES if chunk_size is None else chunk_size
    while chunk >= smallest:
        for blocks in range(max_blocks, 0, -1):
            tile = Tile(chunk, _strip(chunk, best.strip), blocks)
            if vmem_bytes(tile, K, V, dtype) <= TPUS[chip].vmem_bytes:
                return tile
        chunk //= 2
    return None


def _nearest(chip: str, K: int, V: int) -> Tile:
    """The chip's table entry with the nearest state size K V, by ratio."""
    tiles = {key: tile for key, tile in TABLE.items() if key[0] == chip}
    if not tiles:
        return DEFAULT[TPUS[chip].matrix_unit]
    return tiles[min(tiles, key=lambda key: abs(math.log(key[1] * key[2] / (K * V))))]


def _strip(chunk: int, strip: int) -> int:
    return strip if chunk % strip == 0 else common.LANES


def _blocks(tile: Tile, T: int) -> Tile:
    """`tile` with chunks per block reduced to divide the number of chunks, to avoid padding."""
    count = -(-T // tile.chunk)
    blocks = max(n for n in range(1, tile.chunks_per_block + 1) if count % n == 0)
    return tile._replace(chunks_per_block=blocks)
