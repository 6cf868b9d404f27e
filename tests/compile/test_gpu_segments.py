"""Long sequences with few heads launch enough programs of the kernel `states`."""

import math

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import common, mosaic
from pallas_kernels.aot import compiler, resources
from pallas_kernels.mlstm import triton_tiles
from tests.compile import calls
from xlstm_jax import ops
from xlstm_jax.ops.mlstm import segments

MULTIPROCESSORS = 132


def call_of(B, T, H, K, V, implementation="triton", **options):
    """A call of `ops.mlstm` without an initial state, and the shapes of its arguments."""
    bfloat16 = jnp.bfloat16
    args = tuple(calls.shape(B, T, H, width, dtype=bfloat16) for width in (K, K, V))
    args += (calls.shape(B, T, H, dtype=bfloat16),) * 2

    def call(*args):
        return ops.mlstm(*args, implementation=implementation, **options)[0]

    return call, args


def grids(fn, args, chip="sm_90"):
    """Name of every launch -> its number of programs."""
    launches = resources.launches_for(chip, fn, *args)
    return {launch.name: math.prod(launch.grid) for launch in launches}


def test_four_small_heads_fill_the_chip():
    call, args = call_of(1, 65_536, 4, 64, 128)
    programs = grids(calls.gradient(call), args)
    assert MULTIPROCESSORS / 2 < programs["mlstm_states"] <= MULTIPROCESSORS
    assert programs["mlstm_dstates"] == programs["mlstm_states"]
    assert programs["mlstm_h"] == 4 * 65_536 // triton_tiles.POSITIONS


@pytest.mark.parametrize("options", [{}, {"forget_gate": "exp"}], ids=["sigmoid", "exp"])
def test_the_gradient_in_segments_compiles(options):
    call, args = call_of(1, 65_536, 4, 64, 128, **options)
    compiled = compiler.compile_for("sm_90", calls.gradient(call), *args)
    assert compiler.kernels(compiled) == calls.TRITON_GRADIENT
    assert "bf16[32,2048,512]" in compiled.as_text()  # h, of 32 segments


def program_text(call, args):
    with common.compiled_for("sm_90"):
        return str(jax.make_jaxpr(calls.gradient(call))(*args))


@pytest.mark.parametrize(
    "sizes",
    [(8, 8192, 8, 256, 512), (1, 65_536, 8, 256, 512), (1, 2048, 4, 64, 128)],
    ids=["anchor", "8 wide heads", "short"],
)
def test_programs_of_other_calls_are_unchanged(sizes, monkeypatch):
    call, args = call_of(*sizes)
    with_rule = program_text(call, args)
    launched = grids(call, args)["mlstm_states"]
    monkeypatch.setattr(segments, "MIN_SEGMENTS", 10**9)
    assert program_text(call, args) == with_rule
    B, _, H, K, V = sizes
    with common.compiled_for("sm_90"):
        tile = triton_tiles.choose(K, V, jnp.dtype("bfloat16"), sizes[1], None)
    assert launched == B * H * tile.states.programs(K, V)


@pytest.mark.parametrize("K,V", [(64, 128), (128, 128), (40, 96)])
def test_programs_per_head_are_those_of_the_launch(K, V, monkeypatch):
    """Of the tile, for the widths that heads are padded to."""
    counted = []
    rule = segments.segment_length
    monkeypatch.setattr(
        segments,
        "segment_length",
        lambda T, programs, count: counted.append(programs) or rule(T, programs, count) and T,
    )
    call, args = call_of(1, 8192, 2, K, V)
    assert grids(call, args)["mlstm_states"] == counted[0]


@pytest.mark.skipif(
    jax.__version_info__ < mosaic.MIN_JAX, reason="Mosaic GPU kernels need a newer jax"
)
def test_mosaic_kernels_are_split_too():
    call, args = call_of(1, 65_536, 4, 64, 128, implementation="mosaic_gpu")
    assert "bf16[32,2048,512]" in program_text(call, args)
