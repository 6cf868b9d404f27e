"""What the mLSTM kernels read and write, from the compiled programs."""

import re

import jax.numpy as jnp
import pytest

from pallas_kernels.aot import compiler
from pallas_kernels.mlstm import tpu_tiles as tiles
from tests.compile import calls
from tests.compile.calls import B, H

T, K, V = 1024, 256, 512
SIZES = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1}


def _results(text: str, kernel: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and shape of everything that a kernel writes."""
    (line,) = [x for x in text.splitlines() if '"tpu_custom_call"' in x and kernel in x]
    results = line.split(" custom-call(")[0]
    found = re.findall(r"(bf16|f32)\[([\d,]+)\]", results)
    return [(kind, tuple(map(int, sizes.split(",")))) for kind, sizes in found]


def test_without_a_gradient_the_forward_pass_writes_h_and_the_final_state_only():
    call, args = calls.mlstm(T, K, V)
    text = compiler.compile_for("v5e", call, *args).as_text()
    assert _results(text, "mlstm_forward") == [
        ("bf16", (B, T, H * V)),
        ("f32", (B, H, K, V)),
        ("f32", (B, H, 1, K)),
    ]


def test_for_a_gradient_it_writes_the_normaliser_and_one_state_per_chunk_as_well():
    """m comes from the gates alone and is no part of the kernel's."""
    call, args = calls.mlstm(T, K, V)
    text = compiler.compile_for("v5e", calls.gradient(call), *args).as_text()
    N = T // tiles.choose(K, V, jnp.dtype("bfloat16"), T, None, "v5e").chunk
    assert _results(text, "mlstm_forward") == [
        ("bf16", (B, T, H * V)),
        ("f32", (B, H, K, V)),
        ("f32", (B, H, 1, K)),
        ("f32", (B, H, 1, T)),
        ("bf16", (B, H, N, K, V)),
        ("f32", (B, H, N, 1, K)),
    ]


def _copies(text: str, least: int) -> list[str]:
    """Instructions that only move data, of at least `least` bytes."""
    found = []
    for kind, sizes, name in re.findall(
        r"= (bf16|f32)\[([\d,]+)\]\S* (copy|pad|transpose|reshape|concatenate)\(", text
    ):
        elements = 1
        for size in sizes.split(","):
            elements *= int(size)
        if elements * SIZES[kind] >= least:
            found.append(f"{name} {kind}[{sizes}]")
    return found


@pytest.mark.parametrize("part", ["forward", "gradient"])
def test_aligned_sizes_are_not_copied(part):
    """Neither queries, keys, values and h, nor the memory, in values and in cotangents."""
    call, args = calls.mlstm(T, K, V)
    fn = call if part == "forward" else calls.pulled(call)
    text = compiler.compile_for("v5e", fn, *args).as_text()
    assert not _copies(text, least=B * T * H * K * 2)


def test_widths_that_are_no_multiple_of_a_tile_are_filled_up():
    """So the test above can see what it looks for."""
    call, args = calls.mlstm(T, K - 8, V)
    text = compiler.compile_for("v5e", call, *args).as_text()
    assert any(found.startswith("pad") for found in _copies(text, least=B * T * H * K * 2))


def test_the_cost_given_to_the_compiler_is_that_of_the_formulas():
    call, args = calls.mlstm(T, K, V)
    compiled = compiler.compile_for("v5e", call, *args)
    tile = tiles.choose(K, V, jnp.dtype("bfloat16"), T, None, "v5e")
    square = (1 + tile.strip / tile.chunk) / 2 * tile.chunk
    expected = B * T * H * (4 * K * V + 2 * square * (K + V))
    assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.02)
