"""Tiles of the mLSTM Triton kernels: blocks divide the padded sizes; bad calls are refused."""

import itertools

import jax.numpy as jnp
import pytest

from pallas_kernels import common, gpu
from pallas_kernels.hardware import ARCHITECTURES
from pallas_kernels.mlstm import triton_tiles
from pallas_kernels.mlstm.triton_tiles import Tile

DTYPES = [jnp.dtype("float32"), jnp.dtype("bfloat16")]
SIZES = (1, 6, 16, 20, 48, 64, 65, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048)
LENGTHS = (1, 63, 64, 65, 100, 128, 300, 1000, 4096)
CHUNKS = (None, 64, 128, 192, 256, 512)
MIN_BLOCK = 16
"""Smallest block size of a matrix product on a GPU."""

every_chip = pytest.mark.parametrize("chip", ARCHITECTURES)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0


def assert_divides(tile: Tile, K: int, V: int, min_block=MIN_BLOCK):
    """Block sizes are powers of two, at least `min_block`, and divide their widths or chunk."""
    sizes = [(tile.states.k, K), (tile.states.v, V), (tile.states.positions, tile.chunk)]
    for block, inner, width in ((tile.h, K, V), (tile.dv, K, V), (tile.dq, V, K), (tile.dk, V, K)):
        sizes += [(block.inner, inner), (block.state_inner, inner), (block.width, width)]
        sizes += [(block.positions, tile.chunk), (block.other_positions, block.positions)]
    for size, total in sizes:
        assert is_power_of_two(size) and size >= min_block, (size, tile)
        assert total % size == 0, (size, total, tile)
    for block in tile[1:]:
        assert is_power_of_two(block.warps) and block.stages >= 1


@every_chip
@both_dtypes
def test_blocks_divide_the_padded_sizes(chip, dtype):
    with common.compiled_for(chip):
        for K, V in itertools.product(SIZES, SIZES):
            widths = [gpu.width(size, common.LANES) for size in (K, V)]
            assert_divides(triton_tiles.choose(K, V, dtype, 1000, None), *widths)


@every_chip
@both_dtypes
@pytest.mark.parametrize("T", LENGTHS)
def test_chunk_has_the_requested_size_unless_the_sequence_is_shorter(chip, dtype, T):
    max_chunk = common.round_up(T, triton_tiles.POSITIONS)
    with common.compiled_for(chip):
        for chunk_size in CHUNKS:
            tile = triton_tiles.choose(128, 256, dtype, T, chunk_size)
            assert_divides(tile, 128, 256)
            if chunk_size is not None:
                assert tile.chunk == min(chunk_size, max_chunk)


@pytest.mark.parametrize("T,padded", [(1, 64), (129, 192), (257, 384), (600, 640), (8192, 8192)])
def test_chunk_is_chosen_so_that_little_is_padded(T, padded):
    with common.compiled_for("sm_90"):
        chunk = triton_tiles.choose(256, 512, jnp.dtype("bfloat16"), T, None).chunk
    assert common.round_up(T, chunk) == padded and chunk % 64 == 0


def test_best_chunk_is_the_longest_of_equal_padding():
    assert common.best_chunk(8192, 256, 64) == 256
    assert common.best_chunk(384, 256, 64) == 192
    for T in range(1, 1000, 37):
        chunk = common.best_chunk(T, 256, 64)
        assert common.round_up(T, chunk) <= common.round_up(T, min(256, common.round_up(T, 64)))


@every_chip
def test_wide_heads_have_longer_chunks(chip):
    with common.compiled_for(chip):
        chunks = [
            triton_tiles.choose(K, 2 * K, jnp.dtype("bfloat16"), 4096, None).chunk
            for K in (64, 128, 256, 512)
        ]
    assert chunks == [128, 128, 256, 256]


@pytest.mark.parametrize("lanes", [8, 16, 32, 64, 128])
def test_interpreted_blocks_divide_the_padded_sizes(lanes):
    for K, V, T in itertools.product((1, 6, 20, 64, 96), (10, 16, 128), (1, 9, 100)):
        with common.interpreted(lanes=lanes):
            tile = triton_tiles.choose(K, V, DTYPES[0], T, None)
        widths = [gpu.width(size, lanes) for size in (K, V)]
        assert_divides(tile, *widths, min_block=min(lanes, MIN_BLOCK))


@pytest.mark.parametrize("size", range(1, 300, 7))
def test_width_is_padded_to_a_power_of_two_or_a_multiple_of_64(size):
    width = gpu.width(size, common.LANES)
    allowed = [16, 32, 64, *range(128, 512, 64)]
    assert width == min(w for w in allowed if w >= size)
    assert gpu.width(width, common.LANES) == width


@pytest.mark.parametrize("lanes,min_width", [(4, 4), (8, 8), (16, 16), (128, 16)])
def test_interpreted_widths_may_be_smaller(lanes, min_width):
    assert gpu.width(1, lanes) == min_width


@pytest.mark.parametrize(
    "dtype,chunk_size,message",
    [
        ("float16", None, "float16 overflows in exponential gates; use bfloat16 or float32"),
        ("float64", None, "it computes with float32 and bfloat16, not with float64"),
        (
            "bfloat16",
            100,
            "chunk_size=100 is not a multiple of 64, the tile; use 128 or None",
        ),
        ("float32", 32, "chunk_size=32 is not a multiple of 64, the tile; use 64 or None"),
    ],
)
def test_unsupported_calls_are_refused_with_a_supported_alternative(dtype, chunk_size, message):
    dtype = jnp.dtype(dtype)
    assert triton_tiles.refusal(64, 64, dtype, chunk_size) == message
    with common.compiled_for("sm_80"), pytest.raises(ValueError) as error:
        triton_tiles.choose(64, 64, dtype, 256, chunk_size)
    assert str(error.value) == f"mlstm: {message}."


def test_very_wide_heads_are_supported():
    for dtype, chunk_size in itertools.product(DTYPES, CHUNKS):
        assert triton_tiles.refusal(4096, 8192, dtype, chunk_size) is None


def test_interpreted_chunks_are_multiples_of_the_lanes():
    with common.interpreted(lanes=8):
        assert triton_tiles.refusal(6, 10, DTYPES[0], 24) is None
        assert "not a multiple of 8" in str(triton_tiles.refusal(6, 10, DTYPES[0], 20))
