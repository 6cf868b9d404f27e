"""One step of the sLSTM in Triton, interpreted, against the cell; and what is launched."""

import collections
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
    Case,
    assert_equal_results,
    assert_step_equals_the_cell,
    in_bfloat16,
    make_case,
    truth,
    with_flags,
)
from tests.kernels.watch import launches, watched
from tests.ops.subjects import implementations
from tests.ops.tolerances import TABLE

REFUSAL = implementations("slstm")["triton"]

pytestmark = [
    pytest.mark.slow,  # cases by an interpreter; quick ones are in tests/ops and test_quick.py
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]

both_flags = pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
run = functools.partial(slstm_cases.run, backends.triton())
step = functools.partial(slstm_cases.step, backends.triton())
kernel = functools.partial(slstm_cases.interpret, backends.triton())


def step_case(flags=True, B=4, **options) -> Case:
    """One step of rows that are plain, reset, masked, and both; the masked ones hold NaN."""
    case = make_case(B=B, T=1, **options)
    if not flags:
        return case
    reset, mask = (np.resize(np.array(flag, bool), (B, 1)) for flag in ([0, 1, 0, 1], [1, 1, 0, 0]))
    case.x[~mask[:, 0]] = np.nan
    return case._replace(reset=reset, mask=mask)


@pytest.mark.parametrize(
    "width,forget_gate", [(5, "exp"), (8, "sigmoid"), (64, "sigmoid"), (96, "sigmoid")]
)
@both_flags
def test_one_step_equals_the_cell(flags, width, forget_gate):
    case = step_case(flags, K=width)
    found = step(case, forget_gate=forget_gate)
    assert_step_equals_the_cell(case, found, forget_gate=forget_gate)


@pytest.mark.parametrize("flags,B", [(True, 1), (True, 16), (False, 17), (True, 33)])
def test_one_step_of_any_number_of_rows_touches_no_other(flags, B):
    """h as well: of two blocks of cells each reads all of the old one."""
    case = step_case(flags, B=B, K=64)
    with watched() as faults:
        found = step(case)
    assert not faults
    assert_step_equals_the_cell(case, found)


@pytest.mark.parametrize("flags,r_dtype", [(True, "bfloat16"), (False, "float32")])
def test_one_step_in_bfloat16_rounds_operands_only(flags, r_dtype):
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
    case = jax.tree.map(jnp.asarray, make_case(T=4, K=16, flags=True))

    def one_by_one(c):
        state, found = c.state, []
        for t in range(4):
            now = slice(t, t + 1)
            one = c._replace(x=c.x[:, now], reset=c.reset[:, now], mask=c.mask[:, now])
            h, state = run(one._replace(state=state))
            found.append(h)
        return jnp.concatenate(found, 1), state

    with common.interpreted(lanes=LANES):
        expected = quick.jit(run)(case)
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
        jax.make_jaxpr(run)(case)
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


@both_flags
def test_a_forward_pass_is_one_kernel_and_its_gradient_another_one(flags):
    case = jax.tree.map(jnp.asarray, make_case(T=3, flags=flags))
    assert started(run, case) == FORWARD
    gradient = jax.grad(lambda x: jnp.sum(run(case._replace(x=x))[0] * case.dh))
    assert started(gradient, case.x) == FORWARD | BACKWARD


def test_one_step_decodes_unless_it_is_differentiated():
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    assert started(run, case) == DECODE
    gradient = jax.grad(lambda x: jnp.sum(run(case._replace(x=x))[0] * case.dh))
    assert started(gradient, case.x) == FORWARD | BACKWARD


def test_there_is_a_program_for_every_head_and_16_rows():
    case = jax.tree.map(jnp.asarray, make_case(B=33, T=2, H=3))
    assert launches(run, case) == [("slstm_forward", (3, 3))]


@pytest.mark.parametrize("width,programs", [(8, 1), (64, 2), (96, 4), (128, 4), (192, 6)])
def test_one_step_has_a_program_for_every_32_cells(width, programs):
    case = jax.tree.map(jnp.asarray, make_case(B=17, T=1, H=3, K=width))
    assert launches(run, case) == [("slstm_decode", (3, 2, programs))]


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
    h, state, steps = 2 * 4 * 16, 4 * 2 * 16, 2 * 3 * 16
    assert outputs_of_the_forward_pass(run, case) == [h, state, 1, 1]
    for save_gates, gates in ((True, 4 * steps), (False, 1)):
        gradient = functools.partial(slstm_cases.value_and_gradients, backends.triton())
        with slstm_cases.saving_gates(save_gates):
            assert outputs_of_the_forward_pass(gradient, case) == [h, state, 3 * steps, gates]


def test_kernels_are_compiled_for_the_chip_as_its_tile_says():
    """The gradient too, although it is traced when the chip is no longer named."""
    seen = {}

    def call(kernel, arrays, out_shape, *, name, **settings):
        seen[name] = settings
        return tuple(jnp.zeros(x.shape, x.dtype) for x in out_shape)

    def forward(c):
        with common.compiled_for("sm_90"):
            return run(c)[0]

    case = jax.tree.map(jnp.asarray, make_case(T=2, K=256))
    with mock.patch.object(gpu, "call", call):
        jax.eval_shape(jax.grad(lambda c: jnp.sum(forward(c) * c.dh)), case)
        jax.eval_shape(forward, jax.tree.map(jnp.asarray, make_case(T=1)))
    assert set(seen) == {*FORWARD, *BACKWARD, *DECODE}
    for settings in seen.values():
        assert settings["target"] == "sm_90" and not settings["interpret"]
        assert not settings["UPCAST"]
