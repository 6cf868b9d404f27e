"""HBM traffic of the mLSTM kernels, read from the compiled programs."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import compiler
from pallas_kernels.mlstm import tpu_tiles as tiles
from tests.compile import calls
from tests.compile.calls import B, H

T, K, V = 1024, 256, 512
SIZES = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1}


def _results(text: str, kernel: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and shape of every result of a kernel."""
    (line,) = [x for x in text.splitlines() if '"tpu_custom_call"' in x and kernel in x]
    results = re.findall(r"(bf16|f32)\[([\d,]+)\]", line.split(" custom-call(")[0])
    return [(kind, tuple(map(int, sizes.split(",")))) for kind, sizes in results]


def test_forward_pass_without_gradient_writes_only_h_and_the_final_state():
    call, args = calls.mlstm(T, K, V)
    text = compiler.compile_for("v5e", call, *args).as_text()
    assert _results(text, "mlstm_forward") == [
        ("bf16", (B, T, H * V)),
        ("f32", (B, H, K, V)),
        ("f32", (B, H, 1, K)),
    ]


def test_forward_pass_of_a_gradient_also_writes_the_normalizer_and_chunk_states():
    """m is computed from the gates, outside the kernel."""
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


def _copies(text: str, min_bytes: int) -> list[str]:
    """Instructions that only move data or write constants, of at least `min_bytes`."""
    copies, names = [], "copy|pad|slice|transpose|reshape|concatenate|broadcast"
    for kind, sizes, name in re.findall(rf"= (bf16|f32)\[([\d,]+)\]\S* ({names})\(", text):
        elements = 1
        for size in sizes.split(","):
            elements *= int(size)
        if elements * SIZES[kind] >= min_bytes:
            copies.append(f"{name} {kind}[{sizes}]")
    return copies


def _training(call):
    """The gradient of h alone, from no state."""

    def compute(*inputs):
        h, pullback = jax.vjp(lambda *x: call(*x, None)[0], *inputs)
        return pullback(jnp.sin(h))

    return compute


@pytest.mark.parametrize("part", ["forward", "gradient", "training"])
@pytest.mark.parametrize("K,V", [(K, V), (64, 128)])
def test_aligned_sizes_are_not_copied(part, K, V):
    """Queries, keys, values, h, the state, and their cotangents.

    Two heads of K = 64 share a tile. Without a state, no zeros of its size are copied either.
    """
    call, args = calls.mlstm(T, K, V)
    if part == "training":
        call, args = _training(call), args[:5]
    elif part == "gradient":
        call = calls.pullback(call)
    text = compiler.compile_for("v5e", call, *args).as_text()
    copies = set(_copies(text, min_bytes=min(B * T * H * K * 2, B * H * K * V * 4)))
    assert copies <= {f"concatenate f32[{B},{H},8,{T}]"}  # gates, which XLA computes


@pytest.mark.parametrize("K,V", [(K, V), (64, 128)])
def test_estimated_traffic_of_training_is_that_of_the_operands_and_results(K, V):
    """Per token and head; the states in between add 2 K V + 4 K per chunk to both passes."""
    call, args = calls.mlstm(T, K, V)
    compiled = compiler.compile_for("v5e", _training(call), *args[:5])
    L = tiles.choose(K, V, jnp.dtype("bfloat16"), T, None, "v5e").chunk
    starts = (2 * K * V + 4 * K) / L
    last = 4 * (K * V + K) / T  # the state after the last step, which only the forward pass writes
    expected = {"mlstm_forward": 4 * (K + V) + 36 + starts + last}
    expected["mlstm_backward"] = 8 * (K + V) + 48 + starts
    actual = compiler.bytes_accessed(compiled)
    assert {name: x / (B * T * H) for name, x in actual.items()} == pytest.approx(expected)


def test_unaligned_widths_are_padded():
    """The negative case of the test above."""
    call, args = calls.mlstm(T, K - 8, V)
    text = compiler.compile_for("v5e", call, *args).as_text()
    assert any(copy.startswith("pad") for copy in _copies(text, min_bytes=B * T * H * K * 2))


def test_cost_estimate_of_the_compiler_matches_the_formulas():
    call, args = calls.mlstm(T, K, V)
    compiled = compiler.compile_for("v5e", call, *args)
    tile = tiles.choose(K, V, jnp.dtype("bfloat16"), T, None, "v5e")
    keys_per_query = (tile.chunk + tile.strip) / 2
    expected = B * T * H * (4 * K * V + 2 * keys_per_query * (K + V))
    assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.02)
