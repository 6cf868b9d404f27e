"""Tiles of the sLSTM Triton kernels: blocks divide the head width, resident weights fit."""

import itertools

import jax.numpy as jnp
import pytest

from pallas_kernels import common, gpu
from pallas_kernels.hardware import ARCHITECTURES
from pallas_kernels.slstm import triton_tiles
from pallas_kernels.slstm.triton_tiles import Tile

DTYPES = [jnp.dtype("float32"), jnp.dtype("bfloat16")]
LANES = (4, 8, 16, 32, 64, 128)
MIN_BLOCK = 16
"""Smallest block size of a matrix product on a GPU."""
WIDTHS = sorted({gpu.width(size, common.LANES) for size in range(16, 1025, 16)})

every_chip = pytest.mark.parametrize("chip", ARCHITECTURES)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


def assert_divides(tile: Tile, K: int, min_block=MIN_BLOCK):
    """Block sizes are powers of two, at least `min_block`, and divide K."""
    assert is_power_of_two(tile.warps) and tile.stages >= 1
    if tile.resident:
        assert is_power_of_two(K) and tile.block == tile.inner == tile.cached == 0
        return
    for size in (tile.block, tile.inner):
        assert is_power_of_two(size) and size >= min_block and K % size == 0, (K, tile)
    assert tile.cached in (0, tile.block)


def all_tiles(chip: str, dtype, direction: str) -> dict[int, Tile]:
    """The tile of every width K."""
    with common.compiled_for(chip):
        return {K: getattr(triton_tiles, direction)(K, dtype) for K in WIDTHS}


@every_chip
@both_dtypes
@both_directions
def test_blocks_divide_the_head_width(chip, dtype, direction):
    for K, tile in all_tiles(chip, dtype, direction).items():
        assert_divides(tile, K)


@every_chip
@both_dtypes
@both_directions
def test_resident_and_cached_weights_fit_shared_memory(chip, dtype, direction):
    for K, tile in all_tiles(chip, dtype, direction).items():
        cells = K if tile.resident else tile.cached
        assert 4 * K * cells * dtype.itemsize <= ARCHITECTURES[chip].shared_bytes, (K, tile)


@every_chip
@both_dtypes
def test_weights_are_cached_only_if_the_width_is_a_power_of_two(chip, dtype):
    """One product multiplies a cached block by all cells of the head."""
    for K, tile in all_tiles(chip, dtype, "forward").items():
        assert not tile.cached or is_power_of_two(K), (K, tile)


@every_chip
@both_dtypes
@both_directions
def test_weights_are_resident_up_to_a_maximum_width(chip, dtype, direction):
    resident = [tile.resident for tile in all_tiles(chip, dtype, direction).values()]
    assert resident == sorted(resident, reverse=True) and resident[0] and not resident[-1]


@every_chip
@both_dtypes
def test_backward_kernel_caches_no_streamed_weights(chip, dtype):
    tiles = all_tiles(chip, dtype, "backward").values()
    assert not any(tile.cached for tile in tiles)


@both_directions
def test_bfloat16_heads_of_64_are_resident_on_data_center_gpus(direction):
    for chip, K in itertools.product(("sm_80", "sm_90", "sm_100"), (16, 32, 64)):
        assert all_tiles(chip, DTYPES[1], direction)[K].resident


@pytest.mark.parametrize("lanes", LANES)
@both_dtypes
@both_directions
def test_interpreted_blocks_divide_the_head_width(lanes, dtype, direction):
    for K, tile in interpreted_tiles(lanes, dtype, direction).items():
        assert_divides(tile, K, min_block=min(lanes, MIN_BLOCK))


@both_dtypes
@both_directions
def test_interpreted_weights_are_resident_for_narrow_heads_only(dtype, direction):
    tiles = interpreted_tiles(8, dtype, direction)
    assert tiles[8].resident and not tiles[32].resident


def interpreted_tiles(lanes: int, dtype, direction: str) -> dict[int, Tile]:
    """The tile that the interpreter uses for each of some widths K."""
    sizes = (1, 5, 8, 12, 16, 20, 40, 64, 65, 96, 192, 512)
    with common.interpreted(lanes=lanes):
        widths = [gpu.width(size, lanes) for size in sizes]
        return {K: getattr(triton_tiles, direction)(K, dtype) for K in widths}


@pytest.mark.parametrize("lanes", LANES)
def test_width_is_padded_to_a_power_of_two_or_a_multiple_of_64(lanes):
    min_width = min(lanes, MIN_BLOCK)
    allowed = [w for w in (4, 8, 16, 32, 64) if w >= min_width] + [*range(128, 1088, 64)]
    for size in range(1, 1025):
        width = gpu.width(size, lanes)
        assert width == min(w for w in allowed if w >= size)
        assert gpu.width(width, lanes) == width
