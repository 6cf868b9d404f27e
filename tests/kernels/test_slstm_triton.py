"""The sLSTM's Triton kernels, interpreted, against the recurrence in float64.

Which kernels compute a call, and in blocks of which size, is said here and not left to the chip;
memory that no program has written holds NaN.
"""

import collections
import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_kernels import common, gpu
from tests import quick
from tests.kernels.test_slstm import (
    LANES,
    LEAVES,
    Case,
    assert_equal_results,
    evaluate,
    make_case,
    truth,
)
from tests.kernels.watch import launches, recorded, watched
from tests.ops.subjects import implementations
from tests.ops.tolerances import TABLE, assert_close
from xlstm_jax import cells, ops

REFUSAL = implementations("slstm")["triton"]

pytestmark = [
    pytest.mark.slow,  # two hundred cases by an interpreter; quick ones are among tests/ops
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]
if REFUSAL is None:
    from pallas_kernels.slstm import triton_resident, triton_streamed, triton_tiles
    from pallas_kernels.slstm.triton_tiles import Tile
    from pallas_kernels.slstm.triton_vjp import slstm


def blocks(block: int, inner: int, kept: int = 0) -> "tuple[Tile, Tile]":
    """Tiles, forward and backward, where weights are read at every step."""
    cut = Tile(False, 4, 1, block, inner)
    return cut._replace(kept=kept), cut


def whole() -> "tuple[Tile, Tile]":
    """Tiles, forward and backward, where weights are read once."""
    return (Tile(True, 4, 1),) * 2


@contextlib.contextmanager
def tiled(tiles):
    """Calls traced inside have these tiles; None: those of the interpreter."""
    if tiles is None:
        yield
        return
    forward, backward = tiles
    with (
        mock.patch.object(triton_tiles, "forward", lambda *_: forward),
        mock.patch.object(triton_tiles, "backward", lambda *_: backward),
    ):
        yield


def kernel(case: Case, *, tiles=None, lanes=LANES, **options) -> dict[str, np.ndarray]:
    """Everything by the Triton kernels, interpreted."""
    with tiled(tiles), common.interpreted(lanes=lanes):
        return evaluate(functools.partial(slstm, **options), jax.tree.map(jnp.asarray, case))


def in_bfloat16(case: Case, dtype="float32", r_dtype=None) -> Case:
    """The same case, rounded to bfloat16, in another dtype."""
    half = lambda a, to: np.asarray(jnp.asarray(jnp.asarray(a, jnp.bfloat16), to))  # noqa: E731
    x, dh = half(case.x, dtype), half(case.dh, dtype)
    return case._replace(x=x, dh=dh, r=half(case.r, r_dtype or dtype))


def with_flags(case: Case, reset, mask) -> Case:
    """Flags of a few steps, the same in every row but shifted by one."""
    B = case.x.shape[0]
    shifted = lambda flag: np.stack([np.roll(flag, b) for b in range(B)]).astype(bool)  # noqa: E731
    given = {"reset": reset, "mask": mask}
    return case._replace(**{n: shifted(flag) for n, flag in given.items() if flag is not None})


# Which kernels, and blocks of which size


TILES = {
    "64, kept": (64, whole),
    "128, kept": (128, whole),
    "64 in blocks of 16 and 32": (64, functools.partial(blocks, 16, 32)),
    "64 in blocks of 32 and 16": (64, functools.partial(blocks, 32, 16)),
    "64, a block of 16 kept": (64, functools.partial(blocks, 16, 32, 16)),
    "64, a block of 32 kept": (64, functools.partial(blocks, 32, 16, 32)),
    "64, all in one block": (64, functools.partial(blocks, 64, 64, 64)),
    "128": (128, functools.partial(blocks, 64, 32)),
    "128, a block kept": (128, functools.partial(blocks, 32, 64, 32)),
    "192": (192, functools.partial(blocks, 64, 32)),
    "256": (256, functools.partial(blocks, 64, 64)),
    "256, a block kept": (256, functools.partial(blocks, 64, 32, 64)),
    "512": (512, functools.partial(blocks, 64, 128)),
    "512, a block kept": (512, functools.partial(blocks, 64, 64, 64)),
}
every_tile = pytest.mark.parametrize("width,tiles", TILES.values(), ids=TILES)
both_kernels = pytest.mark.parametrize(
    "tiles", [whole, functools.partial(blocks, 16, 16, 16)], ids=["kept", "streamed"]
)
both_flags = pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
RESET, MASK = np.array([0, 1, 0, 0], bool), np.array([1, 1, 0, 1], bool)
"""Steps of a row; another row has them shifted."""


def small_case(**options) -> Case:
    """Two heads of 16, which all kernels compute."""
    return make_case(**({"T": 9, "K": 16} | options))


@every_tile
@both_flags
def test_heads_of_any_width_equal_the_recurrence(width, tiles, flags):
    B, T = (2, 4) if width <= 128 else (1, 2)
    case = make_case(B=B, T=T, H=1, K=width)
    if flags and width <= 128:
        case = with_flags(case, RESET, MASK)
    elif flags:
        case = with_flags(
            case._replace(x=case.x.repeat(2, 1), dh=case.dh.repeat(2, 1)), RESET, MASK
        )
    assert_equal_results(kernel(case, tiles=tiles()), truth(case))


@every_tile
def test_a_tile_says_which_kernels_compute_a_call(width, tiles):
    seen = []
    call = gpu.call

    def spy(function, *rest, **settings):
        seen.append((function, settings))
        return call(function, *rest, **settings)

    case = jax.tree.map(jnp.asarray, make_case(B=1, T=2, H=1, K=width))
    chosen = tiles()
    with mock.patch.object(gpu, "call", spy), tiled(chosen), common.interpreted(lanes=LANES):
        jax.make_jaxpr(lambda c: jax.vjp(slstm, *c[:4])[1]((c.dh, c.dstate)))(case)
    module = triton_resident if chosen[0].resident else triton_streamed
    assert [function for function, _ in seen] == [module.forward, module.backward]
    for (_, settings), tile in zip(seen, chosen, strict=True):
        given = [settings.get(name, 0) for name in ("BLOCK", "INNER", "KEPT")]
        assert given == [tile.block, tile.inner, tile.kept]


def test_several_heads_and_programs_equal_the_recurrence():
    """Three heads of 17 rows, where one is computed beside nothing."""
    case = make_case(B=17, T=3, H=3, K=32, flags=True)
    expected = truth(case)
    for tiles in (whole(), blocks(16, 32, 16), blocks(32, 16)):
        assert_equal_results(kernel(case, tiles=tiles), expected)


@pytest.mark.parametrize("width", [1, 5, 8, 12, 40, 96])
def test_a_width_that_is_filled_up_equals_the_recurrence(width):
    case = make_case(T=3, H=2, K=width, flags=True)
    assert_equal_results(kernel(case), truth(case))


@pytest.mark.parametrize("lanes", [8, 128])
def test_the_width_that_is_filled_up_to_changes_nothing(lanes):
    case = make_case(T=4, K=5, flags=True)
    assert_equal_results(kernel(case, lanes=lanes), truth(case))


@both_kernels
@pytest.mark.parametrize("B", [1, 15, 16, 17, 33])
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
@pytest.mark.parametrize("T", [1, 2, 9])
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
@pytest.mark.parametrize("T", [1, 9])
def test_where_all_is_masked_the_state_stays_bit_for_bit(T, tiles):
    """Its h too, of which a gradient passes through all steps."""
    case = small_case(T=T)
    case.x[:] = np.nan
    mask = np.zeros(case.x.shape[:2], bool)
    case = jax.tree.map(jnp.asarray, case._replace(mask=mask))

    def run(case):
        state, pull = jax.vjp(
            lambda s: slstm(case.x, case.r, case.b, s, mask=case.mask), case.state
        )
        return state, pull((case.dh, case.dstate))[0]

    with tiled(tiles()), common.interpreted(lanes=LANES):
        (h, state), dstate = quick.jit(run)(case)
        plain = quick.jit(lambda c: slstm(*c[:4], mask=c.mask))(case)
    for old, new, again in zip(case.state, state, plain[1], strict=True):
        np.testing.assert_array_equal(new, old)
        np.testing.assert_array_equal(again, old)
    assert not h.any() and not plain[0].any()
    for name, given, found in zip(LEAVES, case.dstate, dstate, strict=True):
        assert_close(np.asarray(found), np.asarray(given, np.float64), 1e-6, f"d{name}")


@both_kernels
@pytest.mark.parametrize("rubbish", [np.nan, np.inf])
@pytest.mark.parametrize("T", [1, 3])
def test_a_reset_leaves_no_trace_of_a_spoilt_memory(T, rubbish, tiles):
    case = small_case(T=T)
    reset = np.zeros(case.x.shape[:2], bool)
    reset[:, 0] = True
    case = jax.tree.map(jnp.asarray, case._replace(reset=reset))
    spoilt = case._replace(state=tuple(jnp.full_like(leaf, rubbish) for leaf in case.state))
    with tiled(tiles()), common.interpreted(lanes=LANES):
        compute = quick.jit(lambda c: jax.vjp(lambda s: call(c._replace(state=s)), c.state))
        found, clean = compute(spoilt), compute(case)
        jax.tree.map(np.testing.assert_array_equal, found[0], clean[0])
        for leaf in found[1]((case.dh, case.dstate))[0]:
            assert not leaf.any()


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
@both_flags
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("save_gates", [False, True], ids=["computed", "saved"])
def test_gates_of_every_kind_equal_the_recurrence(save_gates, forget_gate, flags, tiles):
    case = small_case(flags=flags)
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
@pytest.mark.parametrize("save_gates", [False, True], ids=["computed", "saved"])
@pytest.mark.parametrize("r_dtype", ["bfloat16", "float32"])
def test_bfloat16_rounds_operands_only(r_dtype, save_gates, tiles):
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
        none, zero = (
            quick.jit(lambda c, b=b: slstm(c.x, c.r, b, c.state))(case) for b in (None, 0 * case.b)
        )
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


# One step


def step(case: Case, **options):
    compute = functools.partial(slstm, **options)
    with common.interpreted(lanes=LANES):
        run = lambda c: compute(c.x, c.r, c.b, c.state, c.reset, c.mask)  # noqa: E731
        return quick.jit(run)(jax.tree.map(jnp.asarray, case))


def step_case(flags=True, B=4, **options) -> Case:
    """One step of rows that are plain, reset, masked, and both; the masked ones hold NaN."""
    case = make_case(B=B, T=1, **options)
    if not flags:
        return case
    reset, mask = (np.resize(np.array(flag, bool), (B, 1)) for flag in ([0, 1, 0, 1], [1, 1, 0, 0]))
    case.x[~mask[:, 0]] = np.nan
    return case._replace(reset=reset, mask=mask)


def assert_step_equals_the_cell(case: Case, found, row=TABLE["float32"], **options):
    h, state = found
    clean = case._replace(x=np.nan_to_num(np.asarray(case.x, np.float32)))
    expected = truth(clean, **options)
    assert_close(np.asarray(h, np.float64), expected["h"], row.h, "h")
    for name, leaf in zip(LEAVES, state, strict=True):
        if name != "h":
            assert_close(np.asarray(leaf), expected[name], row.state, name)
    awake = slice(None) if case.mask is None else case.mask[:, 0]
    assert_close(np.asarray(state[2])[awake], expected["h"][awake, 0], row.h, "h")
    if case.mask is not None:
        for old, leaf in zip(case.state, state, strict=True):
            np.testing.assert_array_equal(leaf[~case.mask[:, 0]], old[~case.mask[:, 0]])


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("width", [5, 8, 64, 96, 128])
@both_flags
def test_one_step_equals_the_cell(flags, width, forget_gate):
    case = step_case(flags, K=width)
    found = step(case, forget_gate=forget_gate)
    assert_step_equals_the_cell(case, found, forget_gate=forget_gate)


@pytest.mark.parametrize("B", [1, 15, 16, 17, 33])
@both_flags
def test_one_step_of_any_number_of_rows_touches_no_other(flags, B):
    """h as well: of two blocks of cells each reads all of the old one."""
    case = step_case(flags, B=B, K=64)
    with watched() as faults:
        found = step(case)
    assert not faults
    assert_step_equals_the_cell(case, found)


@both_flags
@pytest.mark.parametrize("r_dtype", ["bfloat16", "float32"])
def test_one_step_in_bfloat16_rounds_operands_only(r_dtype, flags):
    case = in_bfloat16(step_case(flags, K=32))
    found = step(in_bfloat16(case, "bfloat16", r_dtype))
    assert found[0].dtype == jnp.bfloat16
    assert_step_equals_the_cell(case, found, TABLE["bfloat16"])


def test_one_step_with_large_gates_equals_the_cell():
    case = step_case(K=32, scale=30.0)
    assert_step_equals_the_cell(case, step(case), TABLE["float32, large gates"])


def test_one_step_from_the_empty_memory_equals_the_cell():
    case = step_case(K=32)
    zeros = np.zeros_like(case.state[0])
    case = case._replace(state=(zeros, zeros, zeros, case.state[3] + 50))
    assert_step_equals_the_cell(case, step(case))


@both_flags
def test_one_step_has_the_gradients_of_the_cell(flags):
    case = make_case(B=4, T=1, K=40)
    if flags:
        case = with_flags(case, [1, 0, 0, 1], [1, 1, 0, 0])
        case = case._replace(reset=case.reset[:, :1], mask=case.mask[:, :1])
    assert_equal_results(kernel(case), truth(case))


def test_steps_one_by_one_equal_a_sequence():
    case = jax.tree.map(jnp.asarray, small_case(T=4, flags=True))

    def one_by_one(c):
        state, found = c.state, []
        for t in range(4):
            now = slice(t, t + 1)
            h, state = slstm(c.x[:, now], c.r, c.b, state, c.reset[:, now], c.mask[:, now])
            found.append(h)
        return jnp.concatenate(found, 1), state

    with common.interpreted(lanes=LANES):
        expected = quick.jit(lambda c: slstm(*c[:4], c.reset, c.mask))(case)
        actual = quick.jit(one_by_one)(case)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, actual, expected)


def test_one_step_writes_c_n_and_m_in_place_and_h_elsewhere():
    """Programs of other cells read the old h. Where a result stands elsewhere it holds NaN here."""
    seen = []
    call = gpu.call

    def spy(function, arrays, out_shape, **settings):
        seen.append((arrays, out_shape, settings["aliases"]))
        return call(function, arrays, out_shape, **settings)

    case = jax.tree.map(jnp.asarray, make_case(T=1))
    with mock.patch.object(gpu, "call", spy), common.interpreted(lanes=LANES):
        jax.make_jaxpr(lambda c: slstm(*c[:4]))(case)
    ((arrays, out_shape, aliases),) = seen
    assert len(out_shape) == 4 and aliases == {5: 1, 6: 2, 7: 3}
    for source, result in aliases.items():
        assert arrays[source].shape == out_shape[result].shape
        assert arrays[source].dtype == out_shape[result].dtype


def test_one_step_leaves_the_state_it_was_given_alone():
    case = jax.tree.map(jnp.asarray, step_case(K=16))
    step(case)
    for old, given in zip(step_case(K=16).state, case.state, strict=True):
        np.testing.assert_array_equal(given, old)


# What is launched


FORWARD, BACKWARD, DECODE = ({f"slstm_{n}": 1} for n in ("forward", "backward", "decode"))


def started(function, *arguments) -> dict[str, int]:
    """How often kernels are launched, by name."""
    return collections.Counter(launch.name for launch in launches(function, *arguments))


def call(c: Case):
    return slstm(c.x, c.r, c.b, c.state, c.reset, c.mask)


@both_flags
def test_a_forward_pass_is_one_kernel_and_its_gradient_another_one(flags):
    case = jax.tree.map(jnp.asarray, make_case(T=3, flags=flags))
    assert started(call, case) == FORWARD
    gradient = jax.grad(lambda x: jnp.sum(call(case._replace(x=x))[0] * case.dh))
    assert started(gradient, case.x) == FORWARD | BACKWARD


def test_one_step_decodes_unless_it_is_differentiated():
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    assert started(call, case) == DECODE
    gradient = jax.grad(lambda x: jnp.sum(call(case._replace(x=x))[0] * case.dh))
    assert started(gradient, case.x) == FORWARD | BACKWARD


def test_there_is_a_program_for_every_head_and_16_rows():
    case = jax.tree.map(jnp.asarray, make_case(B=33, T=2, H=3))
    assert launches(call, case) == [("slstm_forward", (3, 3))]


@pytest.mark.parametrize("width,programs", [(8, 1), (64, 2), (96, 4), (128, 4), (192, 6)])
def test_one_step_has_a_program_for_every_32_cells(width, programs):
    case = jax.tree.map(jnp.asarray, make_case(B=17, T=1, H=3, K=width))
    assert launches(call, case) == [("slstm_decode", (3, 2, programs))]


def outputs_of_the_forward_pass(function, case) -> list[int]:
    """How many numbers each of its results has."""
    seen = []
    original = gpu.call

    def spy(kernel, arrays, out_shape, *, name, **settings):
        if name == "slstm_forward":
            seen.append([x.size for x in out_shape])
        return original(kernel, arrays, out_shape, name=name, **settings)

    with mock.patch.object(gpu, "call", spy), common.interpreted(lanes=LANES):
        jax.make_jaxpr(lambda c: function(c))(case)
    (found,) = seen
    return found


def test_only_what_a_gradient_needs_is_saved():
    case = jax.tree.map(jnp.asarray, make_case(B=2, T=3, H=2, K=8))
    h, state, step = 2 * 4 * 16, 4 * 2 * 16, 2 * 3 * 16
    assert outputs_of_the_forward_pass(call, case) == [h, state, 1, 1]
    for save_gates, gates in ((True, 4 * step), (False, 1)):
        compute = functools.partial(slstm, save_gates=save_gates)
        gradient = lambda c, compute=compute: jax.vjp(compute, *c[:4])[1]((c.dh, c.dstate))  # noqa: E731
        assert outputs_of_the_forward_pass(gradient, case) == [h, state, 3 * step, gates]


def test_what_remat_keeps_is_not_computed_again():
    case = jax.tree.map(jnp.asarray, make_case(T=3))
    names = ("slstm_h", "slstm_states", "slstm_gates")

    def gradient(policy):
        again = jax.checkpoint(lambda c: slstm(*c[:4])[0], policy=policy)
        return jax.grad(lambda c: jnp.sum(again(c) * c.dh))

    policies = jax.checkpoint_policies
    kept = gradient(policies.save_only_these_names(*names))
    with common.interpreted(lanes=LANES):
        count = lambda function: _num_kernels(jax.make_jaxpr(function)(case).jaxpr)  # noqa: E731
        assert count(kept) == 2
        assert count(gradient(policies.nothing_saveable)) == 3


def _num_kernels(jaxpr) -> int:
    """Calls in a program, before the compiler joins equal ones."""
    found = 0
    for eqn in jaxpr.eqns:
        inner = jaxprs_in_params(eqn.params)
        found += eqn.primitive.name == "pure_callback" or sum(map(_num_kernels, inner))
    return found


def test_kernels_are_compiled_for_the_chip_as_its_tile_says():
    """The gradient too, although it is traced when the chip is no longer named."""
    seen = {}

    def call(kernel, arrays, out_shape, *, name, **settings):
        seen[name] = settings
        return tuple(jnp.zeros(x.shape, x.dtype) for x in out_shape)

    def forward(c):
        with common.compiled_for("sm_90"):
            return slstm(*c[:4])[0]

    case = jax.tree.map(jnp.asarray, make_case(T=2, K=256))
    with mock.patch.object(gpu, "call", call):
        jax.eval_shape(jax.grad(lambda c: jnp.sum(forward(c) * c.dh)), case)
        jax.eval_shape(forward, jax.tree.map(jnp.asarray, make_case(T=1)))
    assert set(seen) == {*FORWARD, *BACKWARD, *DECODE}
    for settings in seen.values():
        assert settings["target"] == "sm_90" and not settings["interpret"]
        assert not settings["UPCAST"]


# vmap


MAPPED = {
    "x": ("x", "dh"),
    "the state": ("state",),
    "x and flags": ("x", "reset", "mask"),
    "flags": ("reset", "mask"),
    "all but weights": ("x", "state", "dh", "dstate", "reset", "mask"),
    "weights": ("r",),
    "the bias": ("b",),
    "x and weights": ("x", "r", "b"),
    "weights and flags": ("r", "reset", "mask"),
    "everything": Case._fields,
}
every_mapping = pytest.mark.parametrize("names", MAPPED.values(), ids=MAPPED)


def stack(names, size=2, **options):
    """Cases that differ in these fields, one case with another axis in front, and where it is."""
    options = {"B": 2, "T": 3, "K": 5, "flags": True} | options
    cases = [make_case(seed=seed, **options) for seed in range(size)]
    first = cases[0]._asdict()
    cases = [case._replace(**{n: a for n, a in first.items() if n not in names}) for case in cases]
    given = {n: jax.tree.map(jnp.asarray, a) for n, a in first.items()}
    for name in names:
        each = (getattr(case, name) for case in cases)
        given[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    axes = {n: 0 if n in names else None for n in first}
    return cases, Case(**given), Case(**axes)


def assert_each_equals(actual, expected):
    """Results that have another axis in front are those of a loop."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
    jax.tree.map(close, actual, stacked)


def value_and_gradients(c: Case):
    outputs, pull = jax.vjp(lambda *a: slstm(*a, c.reset, c.mask), c.x, c.r, c.b, c.state)
    return outputs, pull((c.dh, c.dstate))


def loop(function, cases):
    compute = quick.jit(function)
    return [compute(jax.tree.map(jnp.asarray, case)) for case in cases]


@every_mapping
@pytest.mark.parametrize("T", [1, 3])
def test_vmap_equals_a_loop(T, names):
    cases, stacked, axes = stack(names, T=T)
    with common.interpreted(lanes=LANES):
        actual = quick.jit(jax.vmap(call, in_axes=(axes,)))(stacked)
        assert_each_equals(actual, loop(call, cases))


@every_mapping
def test_vmap_of_gradients_equals_a_loop(names):
    cases, stacked, axes = stack(names, T=2)
    with common.interpreted(lanes=LANES):
        actual = quick.jit(jax.vmap(value_and_gradients, in_axes=(axes,)))(stacked)
        assert_each_equals(actual, loop(value_and_gradients, cases))


@pytest.mark.parametrize("names", [MAPPED["x"], MAPPED["everything"]], ids=["x", "everything"])
def test_the_gradient_of_a_vmap_equals_a_loop(names):
    cases, stacked, axes = stack(names)

    def loss(c):
        h, state = call(c)
        pairs = zip((h, *state), (c.dh, *c.dstate), strict=True)
        return sum(jnp.sum(found * weight) for found, weight in pairs)

    def of_floats(function):
        return jax.grad(lambda floats, c: function(c._replace(**floats)))

    with common.interpreted(lanes=LANES):
        pick = lambda c: {"x": c.x, "r": c.r, "b": c.b, "state": c.state}  # noqa: E731
        together = of_floats(lambda c: jnp.sum(jax.vmap(loss, in_axes=(axes,))(c)))
        actual = quick.jit(together)(pick(stacked), stacked)
        alone = loop(lambda c: of_floats(loss)(pick(c), c), cases)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    for name, found in actual.items():
        of_name = expected[name]
        if getattr(axes, name) is None:
            of_name = jax.tree.map(lambda a: a.sum(0), of_name)
        close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=5e-6)
        jax.tree.map(close, found, of_name)


@both_flags
@pytest.mark.parametrize("T", [1, 2])
def test_sixteen_models_at_once_equal_a_loop(T, flags):
    names = ("x", "r", "b", "state", "dh", "dstate")
    cases, stacked, axes = stack(names, size=16, T=T, flags=flags, B=1, H=1)
    with common.interpreted(lanes=LANES), recorded() as found:
        actual = quick.jit(jax.vmap(value_and_gradients, in_axes=(axes,)))(stacked)
        grids = list(found)
        assert_each_equals(actual, loop(value_and_gradients, cases))
    # Models become heads: flags that they share do not keep them apart.
    assert grids == [("slstm_forward", (16, 1)), ("slstm_backward", (16, 1))]


def test_rows_of_a_vmap_share_programs():
    _, stacked, axes = stack(MAPPED["all but weights"], size=8)
    mapped = jax.vmap(call, in_axes=(axes,))
    assert launches(mapped, stacked) == [("slstm_forward", (2, 1))]


@pytest.mark.parametrize("inner", [("x",), ("r", "x"), ("state", "mask")], ids=str)
@pytest.mark.parametrize("outer", [("x",), ("r", "b"), ("reset", "mask")], ids=str)
def test_a_vmap_in_a_vmap_equals_two_loops(outer, inner):
    """Outer 3, inner 2; what is mapped by both has two axes in front."""
    cases = [
        [make_case(B=1, T=2, K=5, flags=True, seed=3 * i + j) for j in range(2)] for i in range(3)
    ]
    base = cases[0][0]

    def at(i, j) -> Case:
        pick = lambda n: cases[i if n in outer else 0][j if n in inner else 0]  # noqa: E731
        return Case(*(getattr(pick(name), name) for name in Case._fields))

    given = {}
    for name in Case._fields:
        value = getattr(base, name)
        numbers = [[getattr(at(i, j), name) for j in range(2)] for i in range(3)]
        if name in inner:
            value = [jax.tree.map(lambda *a: np.stack(a), *row) for row in numbers]
            value = jax.tree.map(lambda *a: np.stack(a), *value) if name in outer else value[0]
        elif name in outer:
            value = jax.tree.map(lambda *a: np.stack(a), *(row[0] for row in numbers))
        given[name] = jax.tree.map(jnp.asarray, value)
    axes = [Case(*(0 if n in names else None for n in Case._fields)) for names in (inner, outer)]
    mapped = value_and_gradients
    for of in axes:
        mapped = jax.vmap(mapped, in_axes=(of,))
    with common.interpreted(lanes=LANES):
        actual = quick.jit(mapped)(Case(**given))
        alone = loop(value_and_gradients, [at(i, j) for i in range(3) for j in range(2)])
    split = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), actual)
    assert_each_equals(split, alone)


def test_without_jit_all_is_the_same():
    case = jax.tree.map(jnp.asarray, make_case(T=3, flags=True))
    with common.interpreted(lanes=LANES):
        found, expected = (function(case) for function in (call, quick.jit(lambda c: call(c))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)
