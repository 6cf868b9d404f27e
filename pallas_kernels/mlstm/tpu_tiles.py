"""Tiles of the mLSTM's TPU kernels by chip and head width: a table, a rule, and what fits VMEM.

The table, `tpu_tiles.json`, is written by `experiments/benchmarks/tpu_tiles.py`, which compiles
candidates ahead of time for every chip and ranks them by scheduled bundles and by traffic.
"""

import json
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.hardware import MIB, TPUS
from pallas_kernels.tpu import SCOPED_BYTES, current_chip


class Tile(NamedTuple):
    """How an mLSTM kernel splits a sequence."""

    chunk: int  # positions between two boundaries at which the state is known
    strip: int  # positions of a chunk computed at once
    chunks_per_block: int  # chunks per step of the grid

    def vmem_limit(self, K: int, V: int, dtype: jnp.dtype) -> int | None:
        """The limit of VMEM to compile with; None where the default one will do."""
        need = vmem_bytes(self, K, V, dtype)
        return None if need <= SCOPED_BYTES else common.round_up(need, MIB)


TABLE_FILE = pathlib.Path(__file__).with_suffix(".json")


def read_table(path: pathlib.Path = TABLE_FILE) -> dict[tuple[str, int, int], Tile]:
    """(chip, K, V) -> the fastest of the candidates, for bfloat16."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {
        (row["chip"], row["K"], row["V"]): Tile(*(row[field] for field in Tile._fields))
        for row in rows
    }


TABLE = read_table()
DEFAULT = {128: Tile(256, 128, 2), 256: Tile(512, 256, 1)}
"""By the side of the matrix unit: for chips without a row."""


def choose(
    K: int, V: int, dtype: jnp.dtype, T: int, chunk_size: int | None, chip: str | None = None
) -> Tile:
    """The tile of one call; `chip` None: the one at hand.

    Raises:
        ValueError: `refusal` has a reason.
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
    assert tile is not None  # or else it was refused
    if tile.chunk > longest:
        tile = Tile(longest, _strip(longest, tile.strip), tile.chunks_per_block)
    return _blocks(tile, T)


def refusal(
    K: int, V: int, dtype: jnp.dtype, chunk_size: int | None = None, chip: str | None = None
) -> str | None:
    """Why no tile serves a call, with sizes that would be served; None: one does."""
    refused_chunk = common.refused_chunk(chunk_size, common.lanes())
    reason = common.refused_dtype(jnp.dtype(dtype)) or refused_chunk
    if reason or common.interpreter():
        return reason
    chip = chip or current_chip()
    if chip is None:
        kind, known = jax.devices()[0].device_kind, ", ".join(TPUS)
        return f"the memory of a {kind!r} is not known, only of {known}; name 'chunkwise'"
    if _fitting(K, V, dtype, chunk_size, chip) is not None:
        return None
    vmem = TPUS[chip].vmem_bytes
    smallest = Tile(chunk_size or common.LANES, common.LANES, 1)
    need = vmem_bytes(smallest, K, V, dtype)
    sentence = (
        f"heads of K={K}, V={V} need {need / MIB:.1f} MiB with chunks of {smallest.chunk}, "
        f"a {chip} has {vmem / MIB:.0f} MiB of VMEM"
    )
    fits = None if chunk_size is None else _fitting(K, V, dtype, None, chip)
    if fits is not None:
        return f"{sentence}; chunk_size={fits.chunk} fits"
    smallest = Tile(common.LANES, common.LANES, 1)
    widths = range(common.LANES, 8192, common.LANES)
    width = max(w for w in widths if vmem_bytes(smallest, w, w, dtype) <= vmem)
    return f"{sentence}; K = V = {width} fits: use more heads"


def vmem_bytes(tile: Tile, K: int, V: int, dtype: jnp.dtype) -> int:
    """What the backward kernel, the larger one, takes of VMEM.

    Blocks are held twice, one in use and one on its way. What the compiler adds for values that
    are waiting was found by compiling with ever lower limits: at most 0.55 of the blocks in
    bfloat16 and 0.85 in float32 (jaxlib 0.10.2, libtpu 0.0.42).
    """
    K, V = (common.round_up(size, common.LANES) for size in (K, V))
    item = jnp.dtype(dtype).itemsize
    span = tile.chunk * tile.chunks_per_block
    tokens = span * ((4 * K + 4 * V) * item + 12 * 4)
    states = tile.chunks_per_block * (K * V * item + 8 * 4 * K) + 4 * K * V + 2 * 8 * 4 * K
    square = tile.chunk * (tile.chunk + tile.strip) // 2 * item
    waiting = 1.55 if item == 2 else 1.85
    return round(2 * (tokens + states) * waiting) + square


def _fitting(K, V, dtype, chunk_size, chip) -> Tile | None:
    """The table's tile, or the next smaller one that fits the chip's memory."""
    best = _nearest(chip, K, V)
    if jnp.dtype(dtype) == jnp.float32:
        # A product is six there: what starting a block costs does not count, the code's size does.
        best = best._replace(chunks_per_block=1)
    chunk, most = best.chunk, best.chunks_per_block
    if chunk_size is not None:
        chunk, most = chunk_size, min(most, max(1, chunk * most // chunk_size))
    smallest = common.LANES if chunk_size is None else chunk_size
    while chunk >= smallest:
        for blocks in range(most, 0, -1):
            tile = Tile(chunk, _strip(chunk, best.strip), blocks)
            if vmem_bytes(tile, K, V, dtype) <= TPUS[chip].vmem_bytes:
                return tile
        chunk //= 2
    return None


def _nearest(chip: str, K: int, V: int) -> Tile:
    """The row of that chip whose memory has most nearly as many elements."""
    rows = {key: tile for key, tile in TABLE.items() if key[0] == chip}
    if not rows:
        return DEFAULT[TPUS[chip].matrix_unit]
    return rows[min(rows, key=lambda key: abs(math.log(key[1] * key[2] / (K * V))))]


def _strip(chunk: int, strip: int) -> int:
    return strip if chunk % strip == 0 else common.LANES


def _blocks(tile: Tile, T: int) -> Tile:
    """As many chunks per block as divide the number of chunks, so that no empty one is added."""
    count = -(-T // tile.chunk)
    blocks = max(n for n in range(1, tile.chunks_per_block + 1) if count % n == 0)
    return tile._replace(chunks_per_block=blocks)
