"""The mLSTM's Triton kernels, interpreted, against the recurrence in float64.

Programs of the interpreter cost milliseconds each, so cases are small; memory that no program has
written holds NaN.
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
    RESETS,
    assert_equal_results,
    in_bfloat16,
    make_case,
    truth,
    with_resets,
)
from tests.kernels.watch import watched
from tests.ops.subjects import implementations
from tests.ops.tolerances import TABLE, assert_close

REFUSAL = implementations("mlstm")["triton"]

pytestmark = [
    pytest.mark.slow,  # cases by an interpreter; quick ones are in tests/ops and test_quick.py
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]
if REFUSAL is None:
    from pallas_kernels.mlstm import triton_tiles
    from pallas_kernels.mlstm.triton_tiles import Outputs, States, Tile

run = functools.partial(mlstm_cases.run, backends.triton())


def tile(chunk, k, v, positions, rows, others, inner, memory, width, *, K, V):
    """A tile for heads of the widths K and V, of blocks that are these large where a width is."""

    def outputs(read, written):
        sizes = min(inner, read), min(memory, read), min(width, written)
        return Outputs(rows, others, *sizes, warps=4, stages=1)

    states = States(min(k, K), min(v, V), positions, warps=4, stages=1)
    h, dq = outputs(K, V), outputs(V, K)
    return Tile(chunk, states, h=h, dq=dq, dk=dq, dv=h)


@functools.cache
def usual() -> "Tile":
    """For heads of 6 and 10, padded to 8 and 16, where blocks are not what a test is about."""
    return tile(16, 8, 16, 16, 16, 8, 16, 16, 16, K=8, V=16)


def kernel(case, **options) -> dict[str, np.ndarray]:
    """Everything by the Triton kernels, interpreted."""
    if case.q.shape[-1] == 6 and not options.keys() & {"chunk_size", "tile", "lanes"}:
        options["tile"] = usual()
    return mlstm_cases.interpret(backends.triton(), case, **options)


# Tiles


BLOCKS = {
    "one": (64, 32, 16, 64, 64, 64, 32, 32, 32),
    "chunks": (16, 32, 16, 16, 16, 16, 32, 32, 32),
    "rows, equal to others": (64, 32, 16, 32, 16, 16, 32, 32, 32),
    "rows, larger than others": (32, 32, 16, 8, 32, 8, 32, 32, 32),
    "columns of the memory": (32, 32, 8, 32, 32, 32, 32, 32, 32),
    "rows of the memory": (32, 8, 16, 32, 32, 32, 32, 32, 32),
    "columns of results": (32, 32, 16, 32, 32, 32, 32, 32, 8),
    "widths of products": (32, 32, 16, 32, 32, 16, 8, 32, 32),
    "widths of what the memory is read with": (32, 32, 16, 32, 32, 16, 32, 8, 32),
    "everything": (32, 16, 8, 16, 16, 8, 8, 16, 8),
}
every_tile = pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)


def wide_case(**options):
    """Heads of 20 and 10, padded to 32 and 16; two chunks of 32."""
    return make_case(B=1, T=64, K=20, V=10, **options)


@every_tile
def test_blocks_of_every_kind_do_not_show(blocks):
    case = wide_case(flags=True)
    assert_equal_results(kernel(case, tile=tile(*blocks, K=32, V=16)), truth(case))


@pytest.mark.parametrize("options", [{}, {"normalize": False}], ids=["normalised", "plain"])
def test_blocks_do_not_show_with_the_sigmoid_input_gate(options):
    case = wide_case()
    options = {"input_gate": "sigmoid", **options}
    cut = tile(*BLOCKS["everything"], K=32, V=16)
    assert_equal_results(kernel(case, tile=cut, **options), truth(case, **options))


@pytest.mark.parametrize("chip,dtype", [("sm_80", "float32"), ("sm_90", "bfloat16")])
def test_tiles_of_real_chips_equal_the_recurrence(chip, dtype):
    """Chunks of 128 in two programs of 64 positions; 100 steps are padded."""
    case = in_bfloat16(make_case(B=1, T=100, K=48, V=128, flags=True))
    with common.compiled_for(chip):
        real = triton_tiles.choose(48, 128, jnp.dtype(dtype), 100, None)
    assert real.chunk == 128 and real.h.positions == 64
    actual = kernel(in_bfloat16(case, dtype), lanes=128, tile=real)
    assert_equal_results(actual, truth(case), TABLE[dtype])


@pytest.mark.parametrize("lanes", [16, 128])
def test_any_multiple_of_widths_may_be_interpreted(lanes):
    case = make_case(T=9)
    assert_equal_results(kernel(case, lanes=lanes, chunk_size=None), truth(case))


@pytest.mark.parametrize("blocks", ["rows, larger than others", "everything"])
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_no_program_touches_what_is_not_its_own(blocks, flags):
    """No address beyond an array, and no element that one program writes and another one uses."""
    case = wide_case(flags=flags)
    with watched() as faults:
        kernel(case, tile=tile(*BLOCKS[blocks], K=32, V=16))
    assert not faults


# Sizes


@pytest.mark.parametrize("T", [1, 8, 9, 29])
def test_any_length_equals_the_recurrence(T):
    case = make_case(B=1, T=T, flags=T != 8)
    assert_equal_results(kernel(case, chunk_size=8), truth(case))


@pytest.mark.parametrize("K,V", [(6, 10), (20, 20), (1, 3)])
def test_any_width_equals_the_recurrence(K, V):
    """Padding with zeros, along one axis or both, changes nothing."""
    case = make_case(B=1, T=9, K=K, V=V)
    assert_equal_results(kernel(case, chunk_size=16), truth(case))


def test_any_batch_and_number_of_heads_equals_the_recurrence():
    case = make_case(B=3, T=17, H=3, flags=True)
    assert_equal_results(kernel(case), truth(case))


@pytest.mark.parametrize("chunk_size", [8, 32])
@pytest.mark.parametrize("where", RESETS)
def test_the_chunk_size_changes_nothing_wherever_resets_are(chunk_size, where):
    case = with_resets(make_case(flags=True), where, chunk_size)
    cut = tile(chunk_size, 8, 16, 8, chunk_size, 8, 16, 16, 16, K=8, V=16)
    assert_equal_results(kernel(case, tile=cut), truth(case))


# Numbers


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_equal_the_recurrence(dtype, flags):
    case = in_bfloat16(make_case(flags=flags))
    assert_equal_results(kernel(in_bfloat16(case, dtype)), truth(case), TABLE[dtype])


@pytest.mark.parametrize(
    "dtype,options",
    [("float32", {"normalize": False}), ("float32", {"eps": 0.5}), ("bfloat16", {})],
    ids=str,
)
def test_the_sigmoid_input_gate_equals_the_recurrence(dtype, options):
    case = in_bfloat16(make_case(flags=True))
    options = {"input_gate": "sigmoid", **options}
    actual = kernel(in_bfloat16(case, dtype), **options)
    assert_equal_results(actual, truth(case, **options), TABLE[dtype])


def test_states_in_bfloat16_cost_results_their_digits_and_the_last_state_none():
    """h and gradients read the states at chunk starts in the dtype of q; the last is float32."""
    case = in_bfloat16(make_case(flags=True))
    expected, wide = truth(case), kernel(case)
    narrow = kernel(in_bfloat16(case, "bfloat16"))
    assert_equal_results(narrow, expected, TABLE["bfloat16"])
    for name in ("C", "n", "m"):  # products of operands that are bfloat16 already
        assert_close(narrow[name], expected[name], TABLE["bfloat16"].state, name)
    for name in ("h", "df"):
        errors = [np.abs(result[name] - expected[name]).max() for result in (wide, narrow)]
        assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("scale", [8.0, 30.0])
def test_large_gates_equal_the_recurrence(scale):
    case = wide_case(scale=scale, flags=True)
    actual = kernel(case, tile=tile(*BLOCKS["rows, equal to others"], K=32, V=16))
    assert_equal_results(actual, truth(case), TABLE["float32, large gates"])


def test_a_memory_of_tiny_scale_is_read_as_little_as_by_the_recurrence():
    """Log-scales around the lowest at which a memory is read, and nothing that is written."""
    case = make_case(flags=True)
    case.state[2][:] = [[-20.0, -25.0], [-22.0, -200.0]]
    case.i[:] -= 250
    case.reset[:] = False
    actual, expected = kernel(case), truth(case)
    assert np.abs(expected["h"]).max() < 1e-6
    assert_close(actual["h"], expected["h"], TABLE["float32"].h, "h")


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 3e38])
def test_a_masked_step_is_never_read(rubbish):
    case = make_case(flags=True)
    dirty = {name: getattr(case, name).copy() for name in (*INPUTS, "dh")}
    for array in dirty.values():
        array[~case.mask] = rubbish
    dirty["dh"] = np.where(np.isfinite(dirty["dh"]), dirty["dh"], 1e6)  # of an h that is 0
    clean, found = kernel(case), kernel(case._replace(**dirty, reset=case.reset | ~case.mask))
    for name, value in clean.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    for name in ("h", *(f"d{name}" for name in INPUTS)):
        assert not clean[name][~case.mask].any()


def test_where_all_is_masked_the_state_stays_bit_for_bit():
    case = make_case(flags=True)
    case.mask[:] = False
    actual = kernel(case)
    for name, leaf in zip(LEAVES, case.state, strict=True):
        np.testing.assert_array_equal(actual[name], leaf, err_msg=name)
    for name, cotangent in zip(LEAVES, case.dstate, strict=True):
        assert_close(actual[f"d{name}"], cotangent.astype(np.float64), 1e-5, f"d{name}")
