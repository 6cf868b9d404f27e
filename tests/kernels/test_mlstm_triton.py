"""The mLSTM Triton kernels, interpreted, against the recurrence in float64.

An interpreted program takes milliseconds, so cases are small. Uninitialized memory holds NaN.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common
from pallas_kernels.mlstm import backends
from tests.kernels import mlstm_cases
from tests.kernels.mlstm_cases import (
    INPUTS,
    LEAVES,
    RESET_PATTERNS,
    assert_results_match,
    in_bfloat16,
    make_case,
    reference,
    with_resets,
)
from tests.kernels.triton_interpreter import race_detector
from tests.ops.subjects import implementations
from tests.ops.tolerances import TABLE, assert_close

REFUSAL = implementations("mlstm")["triton"]

pytestmark = [
    pytest.mark.slow,  # interpreted; quick cases are in tests/ops and test_quick.py
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]
if REFUSAL is None:
    from pallas_kernels.mlstm import triton_tiles
    from pallas_kernels.mlstm.triton_tiles import Outputs, States, Tile

run = functools.partial(mlstm_cases.run, backends.triton())


def tile(
    chunk, k, v, state_positions, positions, other_positions, inner, state_inner, width, *, K, V
):
    """A tile for heads of widths K and V; block sizes along a width are clipped to it."""

    def outputs(read, written):
        sizes = min(inner, read), min(state_inner, read), min(width, written)
        return Outputs(positions, other_positions, *sizes, warps=4, stages=1)

    states = States(min(k, K), min(v, V), state_positions, warps=4, stages=1)
    h, dq = outputs(K, V), outputs(V, K)
    return Tile(chunk, states, h=h, dq=dq, dk=dq, dv=h)


@functools.cache
def default_tile() -> "Tile":
    """The tile of tests that do not vary it, for heads of 6 and 10, padded to 8 and 16."""
    return tile(16, 8, 16, 16, 16, 8, 16, 16, 16, K=8, V=16)


def kernel(case, **options) -> dict[str, np.ndarray]:
    """h, the final state and all gradients by the Triton kernels, interpreted."""
    if case.q.shape[-1] == 6 and not options.keys() & {"chunk_size", "tile", "lanes"}:
        options["tile"] = default_tile()
    return mlstm_cases.interpret(backends.triton(), case, **options)


# Tiles


BLOCKS = {
    "one block": (64, 32, 16, 64, 64, 64, 32, 32, 32),
    "several chunks": (16, 32, 16, 16, 16, 16, 32, 32, 32),
    "positions = other_positions": (64, 32, 16, 32, 16, 16, 32, 32, 32),
    "positions > other_positions": (32, 32, 16, 8, 32, 8, 32, 32, 32),
    "state blocks of V": (32, 32, 8, 32, 32, 32, 32, 32, 32),
    "state blocks of K": (32, 8, 16, 32, 32, 32, 32, 32, 32),
    "width": (32, 32, 16, 32, 32, 32, 32, 32, 8),
    "inner": (32, 32, 16, 32, 32, 16, 8, 32, 32),
    "state_inner": (32, 32, 16, 32, 32, 16, 32, 8, 32),
    "all dimensions": (32, 16, 8, 16, 16, 8, 8, 16, 8),
}
every_tile = pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)


def wide_case(**options):
    """Heads of 20 and 10, padded to 32 and 16; two chunks of 32."""
    return make_case(B=1, T=64, K=20, V=10, **options)


@every_tile
def test_block_sizes_do_not_affect_results(blocks):
    case = wide_case(flags=True)
    assert_results_match(kernel(case, tile=tile(*blocks, K=32, V=16)), reference(case))


@pytest.mark.parametrize("options", [{}, {"normalize": False}], ids=["normalized", "plain"])
def test_block_sizes_do_not_affect_results_with_sigmoid_input_gate(options):
    case = wide_case()
    options = {"input_gate": "sigmoid", **options}
    small_blocks = tile(*BLOCKS["all dimensions"], K=32, V=16)
    assert_results_match(kernel(case, tile=small_blocks, **options), reference(case, **options))


@pytest.mark.parametrize("chip,dtype", [("sm_80", "float32"), ("sm_90", "bfloat16")])
def test_tiles_of_real_chips_match_recurrence(chip, dtype):
    """Chunks of 128 are computed by two programs of 64 positions; 100 positions are padded."""
    case = in_bfloat16(make_case(B=1, T=100, K=48, V=128, flags=True))
    with common.compiled_for(chip):
        real = triton_tiles.choose(48, 128, jnp.dtype(dtype), 100, None)
    assert real.chunk == 128 and real.h.positions == 64
    actual = kernel(in_bfloat16(case, dtype), lanes=128, tile=real)
    assert_results_match(actual, reference(case), TABLE[dtype])


@pytest.mark.parametrize("lanes", [16, 128])
def test_any_lanes_match_recurrence(lanes):
    case = make_case(T=9)
    assert_results_match(kernel(case, lanes=lanes, chunk_size=None), reference(case))


@pytest.mark.parametrize("blocks", ["positions > other_positions", "all dimensions"])
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_programs_have_no_races(blocks, flags):
    """Neither races between programs nor accesses outside of an array."""
    case = wide_case(flags=flags)
    with race_detector() as errors:
        kernel(case, tile=tile(*BLOCKS[blocks], K=32, V=16))
    assert not errors


# Sizes


@pytest.mark.parametrize("T", [1, 8, 9, 29])
def test_any_length_matches_recurrence(T):
    case = make_case(B=1, T=T, flags=T != 8)
    assert_results_match(kernel(case, chunk_size=8), reference(case))


@pytest.mark.parametrize("K,V", [(6, 10), (20, 20), (1, 3)])
def test_any_width_matches_recurrence(K, V):
    """Widths are padded with zeros along one axis or both."""
    case = make_case(B=1, T=9, K=K, V=V)
    assert_results_match(kernel(case, chunk_size=16), reference(case))


def test_odd_batch_and_head_count_match_recurrence():
    case = make_case(B=3, T=17, H=3, flags=True)
    assert_results_match(kernel(case), reference(case))


@pytest.mark.parametrize("chunk_size", [8, 32])
@pytest.mark.parametrize("pattern", RESET_PATTERNS)
def test_chunk_size_does_not_affect_results_with_resets(chunk_size, pattern):
    case = with_resets(make_case(flags=True), pattern, chunk_size)
    chunk_tile = tile(chunk_size, 8, 16, 8, chunk_size, 8, 16, 16, 16, K=8, V=16)
    assert_results_match(kernel(case, tile=chunk_tile), reference(case))


# Numerics


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_match_recurrence(dtype, flags):
    case = in_bfloat16(make_case(flags=flags))
    assert_results_match(kernel(in_bfloat16(case, dtype)), reference(case), TABLE[dtype])


@pytest.mark.parametrize(
    "dtype,options",
    [("float32", {"normalize": False}), ("float32", {"eps": 0.5}), ("bfloat16", {})],
    ids=str,
)
def test_sigmoid_input_gate_matches_recurrence(dtype, options):
    case = in_bfloat16(make_case(flags=True))
    options = {"input_gate": "sigmoid", **options}
    actual = kernel(in_bfloat16(case, dtype), **options)
    assert_results_match(actual, reference(case, **options), TABLE[dtype])


def test_chunk_states_in_bfloat16_round_results_but_not_the_final_state():
    """h and gradients read states at chunk starts in the dtype of q; the final one is float32."""
    case = in_bfloat16(make_case(flags=True))
    expected, float32 = reference(case), kernel(case)
    bfloat16 = kernel(in_bfloat16(case, "bfloat16"))
    assert_results_match(bfloat16, expected, TABLE["bfloat16"])
    for name in ("C", "n", "m"):  # products of operands that are bfloat16 already
        assert_close(bfloat16[name], expected[name], TABLE["bfloat16"].state, name)
    for name in ("h", "df"):
        errors = [np.abs(results[name] - expected[name]).max() for results in (float32, bfloat16)]
        assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("scale", [8.0, 30.0])
def test_large_gates_match_recurrence(scale, forget_gate):
    case, options = wide_case(scale=scale, flags=True), {"forget_gate": forget_gate}
    actual = kernel(case, tile=tile(*BLOCKS["positions = other_positions"], K=32, V=16), **options)
    assert_results_match(actual, reference(case, **options), TABLE["float32, large gates"])


def test_read_out_of_a_state_with_tiny_m_matches_recurrence():
    """m is near the lower limit of the read-out; closed input gates write nothing."""
    case = make_case(flags=True)
    case.state[2][:] = [[-20.0, -25.0], [-22.0, -200.0]]
    case.i[:] -= 250
    case.reset[:] = False
    actual, expected = kernel(case), reference(case)
    assert np.abs(expected["h"]).max() < 1e-6
    assert_close(actual["h"], expected["h"], TABLE["float32"].h, "h")


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
def test_masked_steps_are_not_read(garbage):
    case = make_case(flags=True)
    dirty = {name: getattr(case, name).copy() for name in (*INPUTS, "dh")}
    for array in dirty.values():
        array[~case.mask] = garbage
    # h is 0 where masked, so any finite cotangent must have no effect.
    dirty["dh"] = np.where(np.isfinite(dirty["dh"]), dirty["dh"], 1e6)
    expected = kernel(case)
    actual = kernel(case._replace(**dirty, reset=case.reset | ~case.mask))
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
    for name in ("h", *(f"d{name}" for name in INPUTS)):
        assert not expected[name][~case.mask].any()


def test_fully_masked_sequence_leaves_the_state_bit_identical():
    case = make_case(flags=True)
    case.mask[:] = False
    actual = kernel(case)
    for name, leaf in zip(LEAVES, case.state, strict=True):
        np.testing.assert_array_equal(actual[name], leaf, err_msg=name)
    for name, cotangent in zip(LEAVES, case.dstate, strict=True):
        assert_close(actual[f"d{name}"], cotangent.astype(np.float64), 1e-5, f"d{name}")
