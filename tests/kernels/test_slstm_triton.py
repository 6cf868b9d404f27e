"""The sLSTM Triton kernels over time, interpreted, against the recurrence in float64.

The tests fix the tiles instead of leaving them to the chip. Uninitialized memory holds NaN.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common, gpu
from pallas_kernels.slstm import backends
from tests import quick
from tests.kernels import slstm_cases
from tests.kernels.slstm_cases import (
    LANES,
    LEAVES,
    Case,
    assert_results_match,
    in_bfloat16,
    make_case,
    reference,
    with_flags,
)
from tests.kernels.triton_interpreter import race_detector
from tests.ops.subjects import implementations
from tests.ops.tolerances import TABLE, assert_close
from xlstm_jax import cells, ops

REFUSAL = implementations("slstm")["triton"]

pytestmark = [
    pytest.mark.slow,  # interpreted; quick cases are in tests/ops and test_quick.py
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]
if REFUSAL is None:
    from pallas_kernels.slstm import triton_resident, triton_streamed
    from pallas_kernels.slstm.triton_tiles import Tile, Tiles

run = functools.partial(slstm_cases.run, backends.triton())


def streamed(block: int, inner: int, cached: int = 0, *, width: int = 16) -> "Tiles":
    """Tiles of heads whose weights are loaded at every step."""
    tile = Tile(4, 1, block, inner)
    return Tiles(width, tile._replace(cached=cached), tile)


def resident(*, width: int = 16) -> "Tiles":
    """Tiles of heads whose weights are loaded once."""
    return Tiles(width, *(Tile(4, 1),) * 2)


def kernels(tiles=None):
    """The Triton kernels; without `tiles`, with the interpreter's default tiles."""
    return backends.triton() if tiles is None else slstm_cases.with_tile(backends.triton(), tiles)


def kernel(case: Case, *, tiles=None, **options) -> dict[str, np.ndarray]:
    """h, the final state and all gradients by the Triton kernels, interpreted."""
    return slstm_cases.interpret(kernels(tiles), case, **options)


# Resident and streamed weights, block sizes


TILES = {
    "64, resident": (64, resident),
    "64 in blocks of 16 and 32": (64, functools.partial(streamed, 16, 32)),
    "64 in blocks of 32 and 16": (64, functools.partial(streamed, 32, 16)),
    "64, a block of 16 cached": (64, functools.partial(streamed, 16, 32, 16)),
    "64, a block of 32 cached": (64, functools.partial(streamed, 32, 16, 32)),
    "64, all in one block": (64, functools.partial(streamed, 64, 64, 64)),
    "192": (192, functools.partial(streamed, 64, 32)),
    "256, a block cached": (256, functools.partial(streamed, 64, 32, 64)),
}
every_tile = pytest.mark.parametrize("width,tiles", TILES.values(), ids=TILES)
both_kernels = pytest.mark.parametrize(
    "tiles",
    [resident, functools.partial(streamed, 16, 16, 16)],
    ids=["resident", "streamed"],
)
both_flags = pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
RESET, MASK = np.array([0, 1, 0, 0], bool), np.array([1, 1, 0, 1], bool)
"""Flags of the first sequence; `with_flags` shifts them for the others."""


def small_case(**options) -> Case:
    """Two heads of width 16, which both kernels support."""
    return make_case(**({"T": 5, "K": 16} | options))


@every_tile
@both_flags
def test_every_tile_matches_recurrence(width, tiles, flags):
    case = make_case(B=2 if width <= 64 else 1, T=4 if flags or width <= 64 else 2, H=1, K=width)
    case = with_flags(case, RESET, MASK) if flags else case
    assert_results_match(kernel(case, tiles=tiles(width=width)), reference(case))


@every_tile
def test_tile_selects_the_kernels_and_their_block_sizes(width, tiles):
    calls = []
    call = gpu.call

    def spy(function, *rest, **settings):
        calls.append((function, settings))
        return call(function, *rest, **settings)

    case = jax.tree.map(jnp.asarray, make_case(B=1, T=2, H=1, K=width))
    case_tiles = tiles(width=width)
    compute = functools.partial(slstm_cases.value_and_gradients, kernels(case_tiles))
    with mock.patch.object(gpu, "call", spy), common.interpreted(lanes=LANES):
        jax.make_jaxpr(compute)(case)
    module = triton_resident if case_tiles.forward.resident else triton_streamed
    assert [function for function, _ in calls] == [module.forward, module.backward]
    for (_, settings), tile in zip(calls, case_tiles[1:], strict=True):
        sizes = [settings.get(name, 0) for name in ("BLOCK", "INNER", "CACHED")]
        assert sizes == [tile.block, tile.inner, tile.cached]


def test_several_heads_and_programs_match_recurrence():
    """Three heads; 17 sequences in two programs, one with a single sequence."""
    case = make_case(B=17, T=3, H=3, K=32, flags=True)
    expected = reference(case)
    for tiles in (resident(width=32), streamed(16, 32, 16, width=32), streamed(32, 16, width=32)):
        assert_results_match(kernel(case, tiles=tiles), expected)


@pytest.mark.parametrize("width", [1, 5, 40, 96])
def test_padded_width_matches_recurrence(width):
    case = make_case(T=3, H=2, K=width, flags=True)
    assert_results_match(kernel(case), reference(case))


@pytest.mark.parametrize("lanes", [8, 128])
def test_padding_to_any_lanes_matches_recurrence(lanes):
    case = make_case(T=4, K=5, flags=True)
    assert_results_match(kernel(case, lanes=lanes), reference(case))


@both_kernels
@pytest.mark.parametrize("B", [1, 16, 33])
def test_any_batch_size_matches_recurrence_without_out_of_bounds_access(B, tiles):
    case = small_case(B=B, T=2, flags=True)
    with race_detector() as errors:
        actual = kernel(case, tiles=tiles())
    assert not errors
    assert_results_match(actual, reference(case))


@both_kernels
def test_sequences_of_a_batch_are_independent(tiles):
    case = small_case(B=20, T=3, flags=True)
    first_three = jax.tree.map(lambda a: a[:3], case)._replace(r=case.r, b=case.b)
    twenty, three = kernel(case, tiles=tiles()), kernel(first_three, tiles=tiles())
    for name in twenty.keys() - {"dr", "db"}:
        np.testing.assert_array_equal(three[name], twenty[name][:3], err_msg=name)


@both_kernels
@both_flags
@pytest.mark.parametrize("save_gates", [False, True], ids=["recomputed", "saved"])
def test_programs_have_no_races(save_gates, flags, tiles):
    case = small_case(B=17, T=2, flags=flags)
    with race_detector() as errors:
        kernel(case, tiles=tiles(), save_gates=save_gates)
    assert not errors


@both_kernels
@both_flags
@pytest.mark.parametrize("T", [1, 5])
def test_any_length_matches_recurrence(T, flags, tiles):
    case = small_case(T=T, flags=flags)
    assert_results_match(kernel(case, tiles=tiles()), reference(case))


# Flags


FLAGS = {"resets": (RESET, None), "a mask": (None, MASK), "both": (RESET, MASK)}


@both_kernels
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_resets_and_masks_match_recurrence(flags, tiles):
    case = with_flags(small_case(B=4, T=4), *flags)
    assert_results_match(kernel(case, tiles=tiles()), reference(case))


@both_kernels
def test_results_are_bit_identical_with_no_op_flags(tiles):
    case = small_case()
    ones = np.ones(case.x.shape[:2], bool)
    plain = kernel(case, tiles=tiles())
    flagged = kernel(case._replace(reset=~ones, mask=ones), tiles=tiles())
    for name, value in plain.items():
        np.testing.assert_array_equal(flagged[name], value, err_msg=name)


@both_kernels
@pytest.mark.parametrize("save_gates", [False, True], ids=["recomputed", "saved"])
def test_masked_steps_are_not_read(save_gates, tiles):
    run = functools.partial(kernel, save_gates=save_gates, tiles=tiles())
    case = small_case(flags=True)
    garbage = case.x.copy()
    garbage[~case.mask] = np.nan
    clean, dirty = run(case), run(case._replace(x=garbage, reset=case.reset | ~case.mask))
    for name, value in clean.items():
        np.testing.assert_array_equal(dirty[name], value, err_msg=name)
    assert not clean["h"][~case.mask].any() and not clean["dx"][~case.mask].any()


@both_kernels
@pytest.mark.parametrize("T", [1, 3])
def test_fully_masked_sequence_leaves_the_state_bit_identical(T, tiles):
    """Cotangents of the state, that of h included, pass through all steps."""
    case = small_case(T=T)
    case.x[:] = np.nan
    mask = np.zeros(case.x.shape[:2], bool)
    case = jax.tree.map(jnp.asarray, case._replace(mask=mask))

    with_gradients = functools.partial(slstm_cases.value_and_gradients, kernels(tiles()))
    without = functools.partial(slstm_cases.run, kernels(tiles()))
    with common.interpreted(lanes=LANES):
        (h, state), (*_, dstate) = quick.jit(with_gradients)(case)
        h_without, state_without = quick.jit(without)(case)
    for old, new, new_without in zip(case.state, state, state_without, strict=True):
        np.testing.assert_array_equal(new, old)
        np.testing.assert_array_equal(new_without, old)
    assert not h.any() and not h_without.any()
    for name, expected, actual in zip(LEAVES, case.dstate, dstate, strict=True):
        assert_close(np.asarray(actual), np.asarray(expected, np.float64), 1e-6, f"d{name}")


@both_kernels
@pytest.mark.parametrize("T,bad_value", [(1, np.nan), (3, np.inf)])
def test_reset_discards_a_non_finite_state(T, bad_value, tiles):
    case = small_case(T=T)
    reset = np.zeros(case.x.shape[:2], bool)
    reset[:, 0] = True
    case = jax.tree.map(jnp.asarray, case._replace(reset=reset))
    bad_case = case._replace(state=tuple(jnp.full_like(leaf, bad_value) for leaf in case.state))
    compute = functools.partial(slstm_cases.value_and_gradients, kernels(tiles()))
    with common.interpreted(lanes=LANES):
        (actual, (*_, dstate)), (expected, _) = map(quick.jit(compute), (bad_case, case))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert not any(leaf.any() for leaf in dstate)


@both_kernels
def test_no_gradient_flows_through_a_reset(tiles):
    case = small_case(T=3)
    reset = np.zeros(case.x.shape[:2], bool)
    reset[:, 1] = True
    dh = case.dh * [[[[0]], [[1]], [[1]]]]
    results = kernel(case._replace(reset=reset, dh=dh), tiles=tiles())
    assert not results["dx"][:, 0].any() and results["dx"][:, 1].any()
    for name in LEAVES:
        assert not results[f"d{name}"].any()


# Numerics


@both_kernels
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("save_gates", [False, True], ids=["recomputed", "saved"])
def test_both_forget_gates_match_recurrence(save_gates, forget_gate, tiles):
    case = small_case(flags=True)
    actual = kernel(case, tiles=tiles(), save_gates=save_gates, forget_gate=forget_gate)
    assert_results_match(actual, reference(case, forget_gate=forget_gate))


@both_kernels
@both_flags
def test_m_is_ignored_where_n_is_zero(flags, tiles):
    case = small_case(flags=flags)
    zeros = np.zeros_like(case.state[0])
    case = case._replace(state=(zeros, zeros, zeros, case.state[3] + 50))
    assert_results_match(kernel(case, tiles=tiles()), reference(case))


@both_kernels
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_large_gates_match_recurrence(forget_gate, tiles):
    case = small_case(T=4, flags=True, scale=30.0)
    expected = reference(case, forget_gate=forget_gate)
    actual = kernel(case, tiles=tiles(), forget_gate=forget_gate)
    assert_results_match(actual, expected, TABLE["float32, large gates"])


@both_kernels
def test_results_are_finite_and_bounded_at_huge_gates(tiles):
    results = kernel(small_case(flags=True, scale=1e3), tiles=tiles())
    assert all(np.isfinite(value).all() for value in results.values())
    assert np.abs(results["h"]).max() <= 1 + 1e-6
    assert results["n"].min() >= 1


@pytest.mark.parametrize("name", LEAVES)
@both_kernels
def test_gradient_of_one_leaf_of_the_final_state_matches_recurrence(tiles, name):
    """A loss on c or m alone depends on the stabilizer, so its gradient flows through m."""
    case = small_case(T=4, flags=True)
    dstate = [d if leaf == name else 0 * d for leaf, d in zip(LEAVES, case.dstate, strict=True)]
    case = case._replace(dh=0 * case.dh, dstate=tuple(dstate))
    assert_results_match(kernel(case, tiles=tiles()), reference(case))


@both_kernels
@pytest.mark.parametrize("save_gates,r_dtype", [(False, "float32"), (True, "bfloat16")])
def test_bfloat16_rounds_only_operands(save_gates, r_dtype, tiles):
    case = in_bfloat16(small_case(flags=True))
    bfloat16_case = in_bfloat16(case, "bfloat16", r_dtype)
    actual = kernel(bfloat16_case, tiles=tiles(), save_gates=save_gates)
    assert_results_match(actual, reference(case), TABLE["bfloat16"])


@both_kernels
def test_state_of_bfloat16_inputs_is_float32(tiles):
    """With r = 0 the bfloat16 rounding of h, the operand of the product, has no effect."""
    case = in_bfloat16(small_case(T=2))
    case = case._replace(r=0 * case.r)
    actual = kernel(in_bfloat16(case, "bfloat16"), tiles=tiles())
    expected = reference(case)
    for name in ("c", "n", "m"):
        assert_close(actual[name], expected[name], TABLE["float32"].state, name)


def test_bias_defaults_to_zero():
    case = jax.tree.map(jnp.asarray, small_case(T=2))
    with common.interpreted(lanes=LANES):
        actual, expected = (quick.jit(run)(case._replace(b=b)) for b in (None, 0 * case.b))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@both_flags
@pytest.mark.parametrize("T", [1, 5])
def test_op_supports_reverse_with_triton(T, flags):
    case = jax.tree.map(jnp.asarray, make_case(T=T, K=5, flags=flags))
    state = cells.SLSTMState(*case.state)
    settings = dict(reset=case.reset, mask=case.mask, reverse=True)
    compute = functools.partial(ops.slstm, case.x, case.r, case.b, state, **settings)
    with common.interpreted(lanes=LANES):
        actual = quick.jit(lambda: compute(implementation="triton"))()
    expected = quick.jit(lambda: compute(implementation="recurrent"))()
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, actual, expected)
