"""TPU tiles fit the VMEM of their chips and divide every call; refusals suggest sizes that fit."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import common, tpu
from pallas_kernels.hardware import MIB, TPUS
from pallas_kernels.mlstm import tpu_tiles
from pallas_kernels.mlstm.tpu_tiles import TABLE, Tile
from pallas_kernels.slstm import tpu_tiles as slstm_tiles
from xlstm_jax.modules import presets

BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
WIDTHS = [(64, 64), (64, 96), (128, 256), (256, 512), (512, 512), (512, 1024), (640, 1280)]
LENGTHS = (1, 100, 128, 129, 300, 512, 640, 1000, 1024, 4096 + 1, 65536)
CHUNKS = (None, 128, 256, 384, 512)

every_chip = pytest.mark.parametrize("chip", TPUS)


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: "-".join(map(str, entry)))
def test_every_tile_of_the_table_fits_its_chip(entry):
    chip, K, V = entry
    tile = TABLE[entry]
    assert tpu_tiles.vmem_bytes(tile, K, V, BFLOAT16) <= TPUS[chip].vmem_bytes
    # For a sequence of many chunks the tile of the table is not shortened.
    assert tpu_tiles.choose(K, V, BFLOAT16, 8 * tile.chunk, None, chip) == tile


def assert_divides(tile: Tile, T: int):
    """Lanes divide strips, strips divide the chunk, blocks of chunks divide the sequence."""
    assert tile.chunk % common.LANES == 0 == tile.strip % common.LANES
    assert tile.chunk % tile.strip == 0
    num_chunks = -(-T // tile.chunk)
    assert num_chunks % tile.chunks_per_block == 0


@every_chip
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_a_tile_divides_every_call_and_fits_its_chip(chip, dtype):
    num_supported = 0
    for K, V in WIDTHS:
        for chunk_size in CHUNKS:
            if tpu_tiles.refusal(K, V, dtype, chunk_size, chip) is not None:
                continue
            num_supported += 1
            for T in LENGTHS:
                tile = tpu_tiles.choose(K, V, dtype, T, chunk_size, chip)
                assert_divides(tile, T)
                assert tpu_tiles.vmem_bytes(tile, K, V, dtype) <= TPUS[chip].vmem_bytes
                if chunk_size is not None:
                    assert tile.chunk == min(chunk_size, common.round_up(T, common.LANES))
    assert num_supported >= len(WIDTHS)


@every_chip
@pytest.mark.parametrize("T", [1, 128, 200])
def test_a_chunk_is_no_longer_than_the_padded_sequence(chip, T):
    for K, V in WIDTHS[:4]:
        tile = tpu_tiles.choose(K, V, BFLOAT16, T, None, chip)
        assert tile.chunk <= common.round_up(T, common.LANES)


@pytest.mark.parametrize("T", [1, 13, 16, 64, 100])
@pytest.mark.parametrize("chunk_size", [None, 8, 32])
def test_an_interpreted_tile_has_strips_of_the_interpreted_lanes(T, chunk_size):
    with common.interpreted(lanes=8):
        tile = tpu_tiles.choose(8, 8, FLOAT32, T, chunk_size)
    assert tile.strip == 8 and tile.chunk % 8 == 0
    assert tile.chunk == min(chunk_size or 16, common.round_up(T, 8))
    assert -(-T // tile.chunk) % tile.chunks_per_block == 0


@every_chip
@pytest.mark.parametrize("K,V", WIDTHS)
def test_vmem_limit_is_raised_only_if_the_default_is_too_small(chip, K, V):
    for dtype in (BFLOAT16, FLOAT32):
        if tpu_tiles.refusal(K, V, dtype, None, chip) is None:
            tile = tpu_tiles.choose(K, V, dtype, 4096, None, chip)
            need = tpu_tiles.vmem_bytes(tile, K, V, dtype)
            limit = tile.vmem_limit(K, V, dtype)
            assert (limit is None) == (need <= 16 * MIB)
            assert limit is None or need <= limit <= TPUS[chip].vmem_bytes


# Refusals


def test_unsupported_dtypes_are_refused_and_supported_ones_named():
    for refusal in (
        lambda dtype: tpu_tiles.refusal(64, 64, jnp.dtype(dtype), None, "v5e"),
        lambda dtype: slstm_tiles.refusal(64, jnp.dtype(dtype), "v5e"),
    ):
        assert refusal("float16") == (
            "float16 overflows in exponential gates; use bfloat16 or float32"
        )
        assert refusal("float64") == "it computes with float32 and bfloat16, not with float64"
        assert refusal("float32") is None is refusal("bfloat16")


def test_unsupported_chunk_size_is_refused_with_a_supported_one():
    refusal = tpu_tiles.refusal(64, 64, BFLOAT16, 100, "v5e")
    assert refusal == "chunk_size=100 is not a multiple of 128, the tile; use 128 or None"
    assert "use 384 or None" in tpu_tiles.refusal(64, 64, BFLOAT16, 257, "v5e")
    assert tpu_tiles.refusal(64, 64, BFLOAT16, 384, "v5e") is None
    with common.interpreted(lanes=8):
        assert "use 16 or None" in tpu_tiles.refusal(8, 8, FLOAT32, 12)


@every_chip
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_too_wide_heads_are_refused_with_the_widest_that_fit(chip, dtype):
    refusal = tpu_tiles.refusal(8192, 4096, dtype, None, chip)
    words = (
        r"heads of K=8192, V=4096 need ([\d.]+) MiB with chunks of 128, "
        rf"a {chip} has (\d+) MiB of VMEM; K = V = (\d+) fits: use more heads"
    )
    need, has, width = map(float, re.fullmatch(words, refusal).groups())
    assert need > has == TPUS[chip].vmem_bytes / MIB
    fits = int(width)
    assert tpu_tiles.refusal(fits, fits, dtype, None, chip) is None
    assert tpu_tiles.refusal(fits + 128, fits + 128, dtype, None, chip) is not None


def test_too_long_chunk_is_refused_with_one_that_fits():
    num_refused = 0
    for chip in TPUS:
        for K, V in WIDTHS:
            refusal = tpu_tiles.refusal(K, V, FLOAT32, 4096, chip)
            if refusal is None or "use more heads" in refusal:
                continue
            num_refused += 1
            assert f"heads of K={K}, V={V} need" in refusal and "chunks of 4096" in refusal
            chunk = int(re.search(r"; chunk_size=(\d+) fits$", refusal)[1])
            assert tpu_tiles.refusal(K, V, FLOAT32, chunk, chip) is None
    assert num_refused


def test_choose_raises_the_reason_of_the_refusal():
    refusal = tpu_tiles.refusal(64, 64, BFLOAT16, 100, "v5e")
    with pytest.raises(ValueError) as error:
        tpu_tiles.choose(64, 64, BFLOAT16, 512, 100, "v5e")
    assert str(error.value) == f"mlstm: {refusal}."


def test_unknown_device_is_refused_and_known_tpus_named():
    refusal = tpu_tiles.refusal(64, 64, BFLOAT16)
    assert refusal == (
        f"VMEM of 'cpu' is unknown, known are {', '.join(TPUS)}; use implementation='chunkwise'"
    )


@every_chip
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_too_wide_slstm_heads_are_refused_with_the_widest_that_fit(chip, dtype):
    refusal = slstm_tiles.refusal(8000, dtype, chip)
    words = (
        rf"the recurrent weights of heads of K=8000 in {dtype} do not fit (\d+) MiB of VMEM; "
        r"K=(\d+) fits: use more heads"
    )
    vmem, widest = map(int, re.fullmatch(words, refusal).groups())
    assert 16 <= vmem <= TPUS[chip].vmem_bytes // MIB
    assert slstm_tiles.refusal(widest, dtype, chip) is None
    assert slstm_tiles.refusal(widest + 1, dtype, chip) is not None


# The current chip


@pytest.mark.parametrize(
    "device_kind,chip",
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "v7x"),
        ("TPU v2", None),
        ("NVIDIA H100 80GB HBM3", None),
    ],
)
def test_current_chip_follows_from_the_device_kind(monkeypatch, device_kind, chip):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=device_kind)])
    assert tpu.current_chip() == chip
    if chip is not None:
        tile = tpu_tiles.choose(256, 512, BFLOAT16, 4096, None)
        assert tile == tpu_tiles.choose(256, 512, BFLOAT16, 4096, None, chip)


@every_chip
def test_ahead_of_time_target_gets_its_own_tile(chip):
    assert tpu.current_chip() is None
    with common.compiled_for(chip):
        assert tpu.current_chip() == chip
        tile = tpu_tiles.choose(256, 512, BFLOAT16, 4096, None)
    assert tile == tpu_tiles.choose(256, 512, BFLOAT16, 4096, None, chip)
    assert tpu.current_chip() is None


# Presets


def mlstm_widths(name: str) -> set[tuple[int, int]]:
    """K and V of the heads of every kind of mLSTM in a preset."""
    cfg, widths = presets.get(name), set()
    if "m" in cfg.pattern:
        K = cfg.mlstm.width(cfg.dim) // cfg.mlstm.num_heads
        widths.add((K, K))
    if "M" in cfg.pattern:
        qk_dim, v_dim, _ = cfg.large.widths(cfg.dim)
        widths.add((qk_dim // cfg.large.num_heads, v_dim // cfg.large.num_heads))
    return widths


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_every_preset_has_a_bfloat16_tile(chip):
    refusals = {}
    for name in presets.names():
        assert mlstm_widths(name) or not set(presets.get(name).pattern) & set("mM"), name
        for K, V in mlstm_widths(name):
            reason = tpu_tiles.refusal(K, V, BFLOAT16, None, chip)
            if reason is not None:
                refusals[name] = reason
    assert not refusals


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_slstm_heads_of_every_preset_fit_in_bfloat16(chip):
    refusals = {}
    for name in presets.names():
        cfg = presets.get(name)
        if "s" in cfg.pattern:
            K = cfg.dim // cfg.slstm.num_heads
            reason = slstm_tiles.refusal(K, BFLOAT16, chip)
            if reason is not None:
                refusals[name] = reason
    assert not refusals
