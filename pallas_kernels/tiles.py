"""Sizes of tiles by chip and head width: one table, one rule, and what fits a chip's memory.

The table is written by `experiments/benchmarks/tpu_tiles.py`, which compiles candidates for every
chip without having one and ranks them by scheduled bundles and by traffic.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.slstm import sizes

MIB = 1 << 20


class Chip(NamedTuple):
    """One TPU core, by public data sheets."""

    device_kinds: tuple[str, ...]  # what jax may call it
    vmem_bytes: int
    matrix_unit: int  # side of one matrix unit
    flops_per_second: float  # bfloat16
    flops_per_bundle: int  # of all matrix units together; the quotient is the clock
    hbm_bytes_per_second: float


CHIPS = {
    "v4": Chip(("TPU v4",), 16 * MIB, 128, 1.38e14, 131_072, 6.15e11),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 128 * MIB, 128, 1.97e14, 131_072, 8.2e11),
    "v5p": Chip(("TPU v5", "TPU v5p"), 64 * MIB, 128, 2.30e14, 131_072, 1.23e12),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 128 * MIB, 256, 9.2e14, 524_288, 1.64e12),
    "v7x": Chip(("TPU7x", "TPU7"), 64 * MIB, 256, 1.16e15, 524_288, 3.7e12),
}


class Tile(NamedTuple):
    """How an mLSTM kernel cuts a sequence."""

    chunk: int  # positions between two known states
    strip: int  # rows of a chunk worked on at once
    chunks_per_block: int  # chunks per step of the grid


# (chip, K, V) -> the fastest of the candidates, for bfloat16.
TABLE = {
    ("v4", 128, 256): Tile(128, 128, 4),
    ("v4", 256, 512): Tile(128, 128, 4),
    ("v4", 512, 512): Tile(256, 128, 1),
    ("v5e", 128, 256): Tile(256, 128, 4),
    ("v5e", 256, 512): Tile(256, 128, 2),
    ("v5e", 512, 512): Tile(256, 128, 2),
    ("v5e", 1024, 1024): Tile(256, 128, 1),
    ("v5p", 128, 256): Tile(256, 128, 4),
    ("v5p", 256, 512): Tile(256, 128, 4),
    ("v5p", 512, 512): Tile(128, 128, 4),
    ("v5p", 1024, 1024): Tile(128, 128, 4),
    ("v6e", 128, 256): Tile(256, 256, 2),
    ("v6e", 256, 512): Tile(512, 256, 1),
    ("v6e", 512, 512): Tile(512, 256, 1),
    ("v6e", 1024, 1024): Tile(512, 256, 1),
    ("v7x", 128, 256): Tile(256, 256, 2),
    ("v7x", 256, 512): Tile(512, 256, 2),
    ("v7x", 512, 512): Tile(256, 256, 2),
    ("v7x", 1024, 1024): Tile(256, 256, 1),
}
DEFAULT = {128: Tile(256, 128, 2), 256: Tile(512, 256, 1)}
"""By the side of the matrix unit: for chips without a row."""


def current_chip() -> str | None:
    """The chip that what is traced now will run on, by its key in `CHIPS`; None: no TPU we know."""
    if common.target() is not None:
        return common.target()
    kind = jax.devices()[0].device_kind
    return next((name for name, chip in CHIPS.items() if kind in chip.device_kinds), None)


def mlstm(
    K: int, V: int, dtype: jnp.dtype, T: int, chunk_size: int | None, chip: str | None = None
) -> Tile:
    """The tile of one call; `chip` None: the one at hand.

    Raises:
        ValueError: `mlstm_refusal` has a reason.
    """
    refusal = mlstm_refusal(K, V, dtype, chunk_size, chip)
    if refusal is not None:
        raise ValueError(f"mlstm: {refusal}.")
    lanes = common.lanes()
    whole = common.round_up(T, lanes)
    if common.interpreter():
        chunk = min(chunk_size or 2 * lanes, whole)
        return _blocks(Tile(chunk, lanes, 2), T)
    chip = chip or current_chip()
    tile = None if chip is None else _fitting(K, V, dtype, chunk_size, chip)
    assert tile is not None  # or else it was refused
    if tile.chunk > whole:
        tile = Tile(whole, _strip(whole, tile.strip), tile.chunks_per_block)
    return _blocks(tile, T)


def mlstm_refusal(
    K: int, V: int, dtype: jnp.dtype, chunk_size: int | None = None, chip: str | None = None
) -> str | None:
    """Why no tile serves a call, with sizes that would be served; None: one does."""
    reason = common.refused_dtype(jnp.dtype(dtype))
    if reason is not None:
        return reason
    lanes = common.lanes()
    if chunk_size is not None and chunk_size % lanes:
        near = common.round_up(chunk_size, lanes)
        return f"chunk_size={chunk_size} is not a multiple of {lanes}, the tile; use {near} or None"
    if common.interpreter():
        return None
    chip = chip or current_chip()
    if chip is None:
        kind, known = jax.devices()[0].device_kind, ", ".join(CHIPS)
        return f"the memory of a {kind!r} is not known, only of {known}; name 'chunkwise'"
    if _fitting(K, V, dtype, chunk_size, chip) is not None:
        return None
    return _too_wide(K, V, dtype, chunk_size, chip)


def _too_wide(K, V, dtype, chunk_size, chip) -> str:
    vmem = CHIPS[chip].vmem_bytes
    smallest = Tile(chunk_size or common.LANES, common.LANES, 1)
    need = mlstm_vmem_bytes(smallest, K, V, dtype)
    sentence = (
        f"heads of K={K}, V={V} need {need / MIB:.1f} MiB with chunks of {smallest.chunk}, "
        f"a {chip} has {vmem / MIB:.0f} MiB of VMEM"
    )
    fits = None if chunk_size is None else _fitting(K, V, dtype, None, chip)
    if fits is not None:
        return f"{sentence}; chunk_size={fits.chunk} fits"
    width = max(
        w
        for w in range(common.LANES, 8192, common.LANES)
        if mlstm_vmem_bytes(Tile(common.LANES, common.LANES, 1), w, w, dtype) <= vmem
    )
    return f"{sentence}; K = V = {width} fits: use more heads"


def slstm_vmem_bytes(chip: str | None = None) -> int:
    """What the sLSTM kernels may take of VMEM: all of a small one, half of a large one."""
    chip = chip or current_chip()
    if common.interpreter() or chip is None:
        return common.SCOPED_BYTES
    return max(common.SCOPED_BYTES, CHIPS[chip].vmem_bytes // 2)


def slstm_refusal(K: int, dtype: jnp.dtype, chip: str | None = None) -> str | None:
    """Why no sLSTM kernel serves heads of width K, with a width that is served; None: one does."""
    reason = common.refused_dtype(jnp.dtype(dtype))
    if reason is not None:
        return reason
    vmem = slstm_vmem_bytes(chip)
    widest = sizes.widest(jnp.dtype(dtype), vmem)
    if common.round_up(K, common.lanes()) <= widest:
        return None
    return (
        f"the recurrent weights of heads of K={K} in {dtype} do not fit {vmem / MIB:.0f} MiB of "
        f"VMEM; K={widest} fits: use more heads"
    )


def mlstm_vmem_bytes(tile: Tile, K: int, V: int, dtype: jnp.dtype) -> int:
    """What the backward kernel, the larger one, takes of VMEM.

    Blocks are held twice, one in use and one on its way. What the compiler adds for values that
    are waiting was found by compiling with ever lower limits: at most 0.55 of the blocks in
    bfloat16 and 0.75 in float32 (jaxlib 0.10.2, libtpu 0.0.42).
    """
    K, V = (common.round_up(size, common.LANES) for size in (K, V))
    item = jnp.dtype(dtype).itemsize
    span = tile.chunk * tile.chunks_per_block
    tokens = span * ((4 * K + 4 * V) * item + 12 * 4)
    states = tile.chunks_per_block * (K * V * item + 8 * 4 * K) + 4 * K * V + 2 * 8 * 4 * K
    square = tile.chunk * (tile.chunk + tile.strip) // 2 * item
    waiting = 1.55 if item == 2 else 1.75
    return round(2 * (tokens + states) * waiting) + square


def mlstm_vmem_limit(tile: Tile, K: int, V: int, dtype: jnp.dtype) -> int | None:
    """The limit to compile with; None where the default one will do."""
    need = mlstm_vmem_bytes(tile, K, V, dtype)
    return None if need <= common.SCOPED_BYTES else common.round_up(need, MIB)


def _fitting(K, V, dtype, chunk_size, chip) -> Tile | None:
    """The table's tile, or the next smaller one that fits the chip's memory."""
    best = _nearest(chip, K, V)
    if jnp.dtype(dtype) == jnp.float32:
        # A product is six there: what starting a block costs does not count, the code's size does.
        best = best._replace(chunks_per_block=1)
    if chunk_size is not None:
        blocks = min(
            best.chunks_per_block, max(1, best.chunk * best.chunks_per_block // chunk_size)
        )
        candidates = [Tile(chunk_size, best.strip, blocks)]
    else:
        candidates = [best]
        while candidates[-1].chunk > common.LANES:
            candidates.append(
                Tile(candidates[-1].chunk // 2, best.strip, candidates[-1].chunks_per_block)
            )
    for size in candidates:
        for blocks in range(size.chunks_per_block, 0, -1):
            tile = Tile(size.chunk, _strip(size.chunk, size.strip), blocks)
            if mlstm_vmem_bytes(tile, K, V, dtype) <= CHIPS[chip].vmem_bytes:
                return tile
    return None


def _nearest(chip: str, K: int, V: int) -> Tile:
    """The row of that chip whose memory has most nearly as many elements."""
    rows = {key: tile for key, tile in TABLE.items() if key[0] == chip}
    if not rows:
        return DEFAULT[CHIPS[chip].matrix_unit]
    return rows[min(rows, key=lambda key: abs(math.log(key[1] * key[2] / (K * V))))]


def _strip(chunk: int, strip: int) -> int:
    return strip if chunk % strip == 0 else common.LANES


def _blocks(tile: Tile, T: int) -> Tile:
    """As many chunks per block as divide the number of chunks, so that no empty one is added."""
    count = -(-T // tile.chunk)
    blocks = max(n for n in range(1, tile.chunks_per_block + 1) if count % n == 0)
    return tile._replace(chunks_per_block=blocks)
