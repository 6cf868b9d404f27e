"""The rule of the sLSTM's Triton tiles: blocks divide every head, what is kept has room."""

import itertools

import jax.numpy as jnp
import pytest

from pallas_kernels import common, gpu
from pallas_kernels.hardware import ARCHITECTURES
from pallas_kernels.slstm import triton_tiles
from pallas_kernels.slstm.triton_tiles import Tile

DTYPES = [jnp.dtype("float32"), jnp.dtype("bfloat16")]
LANES = (4, 8, 16, 32, 64, 128)
LEAST = 16
"""Rows and columns that every product of blocks must have on a GPU."""
WIDTHS = sorted({gpu.width(size, common.LANES) for size in range(16, 1025, 16)})

every_chip = pytest.mark.parametrize("chip", ARCHITECTURES)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


def assert_whole(tile: Tile, K: int, least=LEAST):
    """Powers of two that divide the head, no block too small; nothing is cut that stays whole."""
    assert is_power_of_two(tile.warps) and tile.stages >= 1
    if tile.resident:
        assert is_power_of_two(K) and tile.block == tile.inner == tile.cached == 0
        return
    for size in (tile.block, tile.inner):
        assert is_power_of_two(size) and size >= least and K % size == 0, (K, tile)
    assert tile.cached in (0, tile.block)


def all_tiles(chip: str, dtype, direction: str) -> dict[int, Tile]:
    with common.compiled_for(chip):
        return {K: getattr(triton_tiles, direction)(K, dtype) for K in WIDTHS}


@every_chip
@both_dtypes
@both_directions
def test_blocks_divide_every_head(chip, dtype, direction):
    for K, tile in all_tiles(chip, dtype, direction).items():
        assert_whole(tile, K)


@every_chip
@both_dtypes
@both_directions
def test_weights_are_kept_only_where_they_fit(chip, dtype, direction):
    """Four gates of every cell that is computed with what is kept."""
    for K, tile in all_tiles(chip, dtype, direction).items():
        cells = K if tile.resident else tile.cached
        assert 4 * K * cells * dtype.itemsize <= ARCHITECTURES[chip].shared_bytes, (K, tile)


@every_chip
@both_dtypes
def test_what_is_kept_of_a_head_is_read_by_one_product(chip, dtype):
    """All cells of the head are one block of it, so they are a power of two."""
    for K, tile in all_tiles(chip, dtype, "forward").items():
        assert not tile.cached or is_power_of_two(K), (K, tile)


@every_chip
@both_dtypes
@both_directions
def test_narrower_heads_are_kept_where_a_wider_one_is(chip, dtype, direction):
    resident = [tile.resident for tile in all_tiles(chip, dtype, direction).values()]
    assert resident == sorted(resident, reverse=True) and resident[0] and not resident[-1]


@every_chip
@both_dtypes
def test_the_gradient_keeps_no_weights_beside_streamed_ones(chip, dtype):
    """It has no kernel for that."""
    tiles = all_tiles(chip, dtype, "backward").values()
    assert not any(tile.cached for tile in tiles)


@both_directions
def test_on_the_chips_of_data_centres_a_head_of_64_stays_in_bfloat16(direction):
    for chip, K in itertools.product(("sm_80", "sm_90", "sm_100"), (16, 32, 64)):
        assert all_tiles(chip, DTYPES[1], direction)[K].resident


@pytest.mark.parametrize("lanes", LANES)
@both_dtypes
@both_directions
def test_blocks_of_interpreted_calls_divide_them_too(lanes, dtype, direction):
    for K, tile in interpreted_tiles(lanes, dtype, direction).items():
        assert_whole(tile, K, least=min(lanes, LEAST))


@both_dtypes
@both_directions
def test_narrow_heads_are_interpreted_by_one_kernel_and_wide_ones_by_the_other(dtype, direction):
    tiles = interpreted_tiles(8, dtype, direction)
    assert tiles[8].resident and not tiles[32].resident


def interpreted_tiles(lanes: int, dtype, direction: str) -> dict[int, Tile]:
    sizes = (1, 5, 8, 12, 16, 20, 40, 64, 65, 96, 192, 512)
    with common.interpreted(lanes=lanes):
        widths = [gpu.width(size, lanes) for size in sizes]
        return {K: getattr(triton_tiles, direction)(K, dtype) for K in widths}


@pytest.mark.parametrize("lanes", LANES)
def test_a_width_is_padded_to_the_least_one_that_blocks_divide(lanes):
    """Powers of two up to 64, then multiples of 64."""
    least = min(lanes, LEAST)
    allowed = [w for w in (4, 8, 16, 32, 64) if w >= least] + [*range(128, 1088, 64)]
    for size in range(1, 1025):
        width = gpu.width(size, lanes)
        assert width == min(w for w in allowed if w >= size)
        assert gpu.width(width, lanes) == width
