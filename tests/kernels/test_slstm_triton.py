"""The sLSTM's Triton kernels over time, interpreted, against the recurrence in float64.

Which kernels compute a call, and in blocks of which size, is said here and not left to the chip;
memory that no program has written holds NaN.
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
    assert_equal_results,
    in_bfloat16,
    make_case,
    truth,
    with_flags,
)
from tests.kernels.watch import watched
from tests.ops.subjects import implementations
from tests.ops.tolerances import TABLE, assert_close
from xlstm_jax import cells, ops

REFUSAL = implementations("slstm")["triton"]

pytestmark = [
    pytest.mark.slow,  # cases by an interpreter; quick ones are in tests/ops and test_quick.py
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]
if REFUSAL is None:
    from pallas_kernels.slstm import triton_resident, triton_streamed
    from pallas_kernels.slstm.triton_tiles import Tile, Tiles

run = functools.partial(slstm_cases.run, backends.triton())


def streamed(block: int, inner: int, kept: int = 0, *, width: int = 16) -> "Tiles":
    """Tiles of heads whose weights are read at every step."""
    tile = Tile(4, 1, block, inner)
    return Tiles(width, tile._replace(kept=kept), tile)


def resident(*, width: int = 16) -> "Tiles":
    """Tiles of heads whose weights are read once."""
    return Tiles(width, *(Tile(4, 1),) * 2)


def kernels(tiles=None):
    """The Triton kernels; tiles None: those of the interpreter."""
    return backends.triton() if tiles is None else slstm_cases.cut(backends.triton(), tiles)


def kernel(case: Case, *, tiles=None, **options) -> dict[str, np.ndarray]:
    """Everything by the Triton kernels, interpreted."""
    return slstm_cases.interpret(kernels(tiles), case, **options)


# Which kernels, and blocks of which size


TILES = {
    "64, resident": (64, resident),
    "64 in blocks of 16 and 32": (64, functools.partial(streamed, 16, 32)),
    "64 in blocks of 32 and 16": (64, functools.partial(streamed, 32, 16)),
    "64, a block of 16 kept": (64, functools.partial(streamed, 16, 32, 16)),
    "64, a block of 32 kept": (64, functools.partial(streamed, 32, 16, 32)),
    "64, all in one block": (64, functools.partial(streamed, 64, 64, 64)),
    "192": (192, functools.partial(streamed, 64, 32)),
    "256, a block kept": (256, functools.partial(streamed, 64, 32, 64)),
}
every_tile = pytest.mark.parametrize("width,tiles", TILES.values(), ids=TILES)
both_kernels = pytest.mark.parametrize(
    "tiles",
    [resident, functools.partial(streamed, 16, 16, 16)],
    ids=["resident", "streamed"],
)
both_flags = pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
RESET, MASK = np.array([0, 1, 0, 0], bool), np.array([1, 1, 0, 1], bool)
"""Steps of a sequence; another one has them shifted."""


def small_case(**options) -> Case:
    """Two heads of 16, which all kernels compute."""
    return make_case(**({"T": 5, "K": 16} | options))


@every_tile
@both_flags
def test_heads_of_any_width_equal_the_recurrence(width, tiles, flags):
    case = make_case(B=2 if width <= 64 else 1, T=4 if flags or width <= 64 else 2, H=1, K=width)
    case = with_flags(case, RESET, MASK) if flags else case
    assert_equal_results(kernel(case, tiles=tiles(width=width)), truth(case))


@every_tile
def test_a_tile_says_which_kernels_compute_a_call(width, tiles):
    seen = []
    call = gpu.call

    def spy(function, *rest, **settings):
        seen.append((function, settings))
        return call(function, *rest, **settings)

    case = jax.tree.map(jnp.asarray, make_case(B=1, T=2, H=1, K=width))
    chosen = tiles(width=width)
    both = functools.partial(slstm_cases.value_and_gradients, kernels(chosen))
    with mock.patch.object(gpu, "call", spy), common.interpreted(lanes=LANES):
        jax.make_jaxpr(both)(case)
    module = triton_resident if chosen.forward.resident else triton_streamed
    assert [function for function, _ in seen] == [module.forward, module.backward]
    for (_, settings), tile in zip(seen, chosen[1:], strict=True):
        given = [settings.get(name, 0) for name in ("BLOCK", "INNER", "KEPT")]
        assert given == [tile.block, tile.inner, tile.kept]


def test_several_heads_and_programs_equal_the_recurrence():
    """Three heads of 17 sequences, one of them in a program of its own."""
    case = make_case(B=17, T=3, H=3, K=32, flags=True)
    expected = truth(case)
    for tiles in (resident(width=32), streamed(16, 32, 16, width=32), streamed(32, 16, width=32)):
        assert_equal_results(kernel(case, tiles=tiles), expected)


@pytest.mark.parametrize("width", [1, 5, 40, 96])
def test_a_padded_width_equals_the_recurrence(width):
    case = make_case(T=3, H=2, K=width, flags=True)
    assert_equal_results(kernel(case), truth(case))


@pytest.mark.parametrize("lanes", [8, 128])
def test_the_padded_width_changes_nothing(lanes):
    case = make_case(T=4, K=5, flags=True)
    assert_equal_results(kernel(case, lanes=lanes), truth(case))


@both_kernels
@pytest.mark.parametrize("B", [1, 16, 33])
def test_any_number_of_rows_is_computed_and_no_other_touched(B, tiles):
    case = small_case(B=B, T=2, flags=True)
    with watched() as faults:
        actual = kernel(case, tiles=tiles())
    assert not faults
    assert_equal_results(actual, truth(case))


@both_kernels
def test_rows_are_computed_each_by_itself(tiles):
    case = small_case(B=20, T=3, flags=True)
    cut = jax.tree.map(lambda a: a[:3], case)._replace(r=case.r, b=case.b)
    many, few = kernel(case, tiles=tiles()), kernel(cut, tiles=tiles())
    for name in many.keys() - {"dr", "db"}:
        np.testing.assert_array_equal(few[name], many[name][:3], err_msg=name)


@both_kernels
@both_flags
@pytest.mark.parametrize("save_gates", [False, True], ids=["computed", "saved"])
def test_no_program_touches_what_is_not_its_own(save_gates, flags, tiles):
    case = small_case(B=17, T=2, flags=flags)
    with watched() as faults:
        kernel(case, tiles=tiles(), save_gates=save_gates)
    assert not faults


@both_kernels
@both_flags
@pytest.mark.parametrize("T", [1, 5])
def test_any_length_equals_the_recurrence(T, flags, tiles):
    case = small_case(T=T, flags=flags)
    assert_equal_results(kernel(case, tiles=tiles()), truth(case))


# Flags


FLAGS = {"resets": (RESET, None), "a mask": (None, MASK), "both": (RESET, MASK)}


@both_kernels
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_resets_and_masks_equal_the_recurrence(flags, tiles):
    case = with_flags(small_case(B=4, T=4), *flags)
    assert_equal_results(kernel(case, tiles=tiles()), truth(case))


@both_kernels
def test_flags_that_say_nothing_change_no_bit(tiles):
    case = small_case()
    ones = np.ones(case.x.shape[:2], bool)
    plain = kernel(case, tiles=tiles())
    flagged = kernel(case._replace(reset=~ones, mask=ones), tiles=tiles())
    for name, value in plain.items():
        np.testing.assert_array_equal(flagged[name], value, err_msg=name)


@both_kernels
@pytest.mark.parametrize("save_gates", [False, True], ids=["computed", "saved"])
def test_a_masked_step_is_never_read(save_gates, tiles):
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
def test_where_all_is_masked_the_state_stays_bit_for_bit(T, tiles):
    """Its h too, of which a gradient passes through all steps."""
    case = small_case(T=T)
    case.x[:] = np.nan
    mask = np.zeros(case.x.shape[:2], bool)
    case = jax.tree.map(jnp.asarray, case._replace(mask=mask))

    both = functools.partial(slstm_cases.value_and_gradients, kernels(tiles()))
    with common.interpreted(lanes=LANES):
        (h, state), (*_, dstate) = quick.jit(both)(case)
        plain = quick.jit(functools.partial(slstm_cases.run, kernels(tiles())))(case)
    for old, new, again in zip(case.state, state, plain[1], strict=True):
        np.testing.assert_array_equal(new, old)
        np.testing.assert_array_equal(again, old)
    assert not h.any() and not plain[0].any()
    for name, given, found in zip(LEAVES, case.dstate, dstate, strict=True):
        assert_close(np.asarray(found), np.asarray(given, np.float64), 1e-6, f"d{name}")


@both_kernels
@pytest.mark.parametrize("T,rubbish", [(1, np.nan), (3, np.inf)])
def test_a_reset_leaves_no_trace_of_a_spoilt_memory(T, rubbish, tiles):
    case = small_case(T=T)
    reset = np.zeros(case.x.shape[:2], bool)
    reset[:, 0] = True
    case = jax.tree.map(jnp.asarray, case._replace(reset=reset))
    spoilt = case._replace(state=tuple(jnp.full_like(leaf, rubbish) for leaf in case.state))
    with common.interpreted(lanes=LANES):
        both = quick.jit(functools.partial(slstm_cases.value_and_gradients, kernels(tiles())))
        found, clean = both(spoilt), both(case)
    jax.tree.map(np.testing.assert_array_equal, found[0], clean[0])
    assert not any(leaf.any() for leaf in found[1][-1])


@both_kernels
def test_no_gradient_passes_a_reset(tiles):
    case = small_case(T=3)
    reset = np.zeros(case.x.shape[:2], bool)
    reset[:, 1] = True
    found = kernel(case._replace(reset=reset, dh=case.dh * [[[[0]], [[1]], [[1]]]]), tiles=tiles())
    assert not found["dx"][:, 0].any() and found["dx"][:, 1].any()
    for name in LEAVES:
        assert not found[f"d{name}"].any()


# Numbers


@both_kernels
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("save_gates", [False, True], ids=["computed", "saved"])
def test_gates_of_every_kind_equal_the_recurrence(save_gates, forget_gate, tiles):
    case = small_case(flags=True)
    actual = kernel(case, tiles=tiles(), save_gates=save_gates, forget_gate=forget_gate)
    assert_equal_results(actual, truth(case, forget_gate=forget_gate))


@both_kernels
@both_flags
def test_an_empty_memory_takes_the_first_input_whatever_m_is(flags, tiles):
    case = small_case(flags=flags)
    zeros = np.zeros_like(case.state[0])
    case = case._replace(state=(zeros, zeros, zeros, case.state[3] + 50))
    assert_equal_results(kernel(case, tiles=tiles()), truth(case))


@both_kernels
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_large_gates_equal_the_recurrence(forget_gate, tiles):
    case = small_case(T=4, flags=True, scale=30.0)
    expected = truth(case, forget_gate=forget_gate)
    actual = kernel(case, tiles=tiles(), forget_gate=forget_gate)
    assert_equal_results(actual, expected, TABLE["float32, large gates"])


@both_kernels
def test_enormous_gates_keep_everything_finite_and_bounded(tiles):
    found = kernel(small_case(flags=True, scale=1e3), tiles=tiles())
    assert all(np.isfinite(value).all() for value in found.values())
    assert np.abs(found["h"]).max() <= 1 + 1e-6
    assert found["n"].min() >= 1


@pytest.mark.parametrize("name", LEAVES)
@both_kernels
def test_a_loss_on_one_leaf_of_the_last_state_has_its_gradients(tiles, name):
    """As stored: that of m or c alone is not one on the memory, and the log-scale has its own."""
    case = small_case(T=4, flags=True)
    dstate = [d if leaf == name else 0 * d for leaf, d in zip(LEAVES, case.dstate, strict=True)]
    case = case._replace(dh=0 * case.dh, dstate=tuple(dstate))
    assert_equal_results(kernel(case, tiles=tiles()), truth(case))


@both_kernels
@pytest.mark.parametrize("save_gates,r_dtype", [(False, "float32"), (True, "bfloat16")])
def test_bfloat16_rounds_operands_only(save_gates, r_dtype, tiles):
    case = in_bfloat16(small_case(flags=True))
    given = in_bfloat16(case, "bfloat16", r_dtype)
    actual = kernel(given, tiles=tiles(), save_gates=save_gates)
    assert_equal_results(actual, truth(case), TABLE["bfloat16"])


@both_kernels
def test_the_memory_of_bfloat16_inputs_is_float32(tiles):
    """One step from given operands: all that is lost are digits of h's operand."""
    case = in_bfloat16(small_case(T=2))
    case = case._replace(r=0 * case.r)
    actual = kernel(in_bfloat16(case, "bfloat16"), tiles=tiles())
    expected = truth(case)
    for name in ("c", "n", "m"):
        assert_close(actual[name], expected[name], TABLE["float32"].state, name)


def test_without_a_bias_it_is_zero():
    case = jax.tree.map(jnp.asarray, small_case(T=2))
    with common.interpreted(lanes=LANES):
        none, zero = (quick.jit(run)(case._replace(b=b)) for b in (None, 0 * case.b))
    jax.tree.map(np.testing.assert_array_equal, none, zero)


@both_flags
@pytest.mark.parametrize("T", [1, 5])
def test_the_op_computes_them_in_both_directions(T, flags):
    case = jax.tree.map(jnp.asarray, make_case(T=T, K=5, flags=flags))
    state = cells.SLSTMState(*case.state)
    settings = dict(reset=case.reset, mask=case.mask, reverse=True)
    compute = functools.partial(ops.slstm, case.x, case.r, case.b, state, **settings)
    with common.interpreted(lanes=LANES):
        actual = quick.jit(lambda: compute(implementation="triton"))()
    expected = quick.jit(lambda: compute(implementation="recurrent"))()
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, actual, expected)
