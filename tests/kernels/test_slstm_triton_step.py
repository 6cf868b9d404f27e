"""One sLSTM step in Triton, interpreted, against the cell; kernel launches."""

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
    assert_results_match,
    assert_step_matches_cell,
    in_bfloat16,
    make_case,
    reference,
    with_flags,
)
from tests.kernels.triton_interpreter import launches, race_detector, shared_buffers
from tests.ops.subjects import implementations
from tests.ops.tolerances import TABLE

REFUSAL = implementations("slstm")["triton"]

pytestmark = [
    pytest.mark.slow,  # interpreted; quick cases are in tests/ops and test_quick.py
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]

both_flags = pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
run = functools.partial(slstm_cases.run, backends.triton())
step = functools.partial(slstm_cases.step, backends.triton())
kernel = functools.partial(slstm_cases.interpret, backends.triton())


def step_case(flags=True, B=4, **options) -> Case:
    """One step; with flags, sequences are plain, reset, masked, or both. Masked inputs are NaN."""
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
def test_one_step_matches_the_cell(flags, width, forget_gate):
    case = step_case(flags, K=width)
    assert_step_matches_cell(case, step(case, forget_gate=forget_gate), forget_gate=forget_gate)


@pytest.mark.parametrize("flags,B", [(True, 1), (True, 16), (False, 17), (True, 33)])
def test_one_step_of_any_batch_size_has_no_races(flags, B):
    """Nor on h: with two blocks of cells, both programs read all of the old h."""
    case = step_case(flags, B=B, K=64)
    with race_detector() as errors:
        actual = step(case)
    assert not errors
    assert_step_matches_cell(case, actual)


@pytest.mark.parametrize("flags,r_dtype", [(True, "bfloat16"), (False, "float32")])
def test_one_step_in_bfloat16_rounds_only_operands(flags, r_dtype):
    case = in_bfloat16(step_case(flags, K=32))
    h, state = step(in_bfloat16(case, "bfloat16", r_dtype))
    assert h.dtype == jnp.bfloat16
    assert_step_matches_cell(case, (h, state), TABLE["bfloat16"])


def test_one_step_with_large_gates_matches_the_cell():
    case = step_case(K=32, scale=30.0)
    assert_step_matches_cell(case, step(case), TABLE["float32, large gates"])


def test_one_step_ignores_m_where_n_is_zero():
    case = step_case(K=32)
    zeros = np.zeros_like(case.state[0])
    case = case._replace(state=(zeros, zeros, zeros, case.state[3] + 50))
    assert_step_matches_cell(case, step(case))


@both_flags
def test_gradients_of_one_step_match_the_cell(flags):
    case = make_case(B=4, T=1, K=40)
    if flags:
        case = with_flags(case, [1, 0, 0, 1], [1, 1, 0, 0])
        case = case._replace(reset=case.reset[:, :1], mask=case.mask[:, :1])
    assert_results_match(kernel(case), reference(case))


def test_single_steps_match_a_sequence():
    case = jax.tree.map(jnp.asarray, make_case(T=4, K=16, flags=True))

    def step_by_step(c):
        state, outputs = c.state, []
        for t in range(4):
            at_t = slice(t, t + 1)
            one = c._replace(x=c.x[:, at_t], reset=c.reset[:, at_t], mask=c.mask[:, at_t])
            h, state = run(one._replace(state=state))
            outputs.append(h)
        return jnp.concatenate(outputs, 1), state

    with common.interpreted(lanes=LANES):
        expected = quick.jit(run)(case)
        actual = quick.jit(step_by_step)(case)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("width,dtype", [(16, "float32"), (64, "float32"), (64, "bfloat16")])
def test_one_step_may_write_the_state_over_the_old_one(width, dtype):
    """Where XLA updates a slice of a loop carry, the old state and the new one have one buffer."""
    case = in_bfloat16(step_case(K=width))
    with shared_buffers(), race_detector() as errors:
        actual = step(in_bfloat16(case, dtype))
    assert not errors
    assert_step_matches_cell(case, actual, TABLE[dtype])


def test_one_step_does_not_modify_its_argument():
    case = jax.tree.map(jnp.asarray, step_case(K=16))
    step(case)
    for expected, actual in zip(step_case(K=16).state, case.state, strict=True):
        np.testing.assert_array_equal(actual, expected)


# Launches


FORWARD, BACKWARD, DECODE = ({f"slstm_{n}": 1} for n in ("forward", "backward", "decode"))


def launch_counts(function, *arguments) -> dict[str, int]:
    """Number of launches by kernel name."""
    return collections.Counter(launch.name for launch in launches(function, *arguments))


@both_flags
def test_forward_and_backward_passes_launch_one_kernel_each(flags):
    case = jax.tree.map(jnp.asarray, make_case(T=3, flags=flags))
    assert launch_counts(run, case) == FORWARD
    gradient = jax.grad(lambda x: jnp.sum(run(case._replace(x=x))[0] * case.dh))
    assert launch_counts(gradient, case.x) == FORWARD | BACKWARD


def test_one_step_uses_the_decode_kernel_unless_differentiated():
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    assert launch_counts(run, case) == DECODE
    gradient = jax.grad(lambda x: jnp.sum(run(case._replace(x=x))[0] * case.dh))
    assert launch_counts(gradient, case.x) == FORWARD | BACKWARD


def test_grid_has_a_program_per_head_and_16_sequences():
    case = jax.tree.map(jnp.asarray, make_case(B=33, T=2, H=3))
    assert launches(run, case) == [("slstm_forward", (3, 3))]


@pytest.mark.parametrize("width,programs", [(8, 1), (64, 2), (96, 4), (128, 4), (192, 6)])
def test_grid_of_one_step_has_a_program_per_32_cells(width, programs):
    case = jax.tree.map(jnp.asarray, make_case(B=17, T=1, H=3, K=width))
    assert launches(run, case) == [("slstm_decode", (3, 2, programs))]


def forward_output_sizes(function, case) -> list[int]:
    """Number of elements of each output of the forward kernel."""
    sizes = []
    original = gpu.call

    def spy(kernel, arrays, out_shape, *, name, **settings):
        if name == "slstm_forward":
            sizes.append([x.size for x in out_shape])
        return original(kernel, arrays, out_shape, name=name, **settings)

    with mock.patch.object(gpu, "call", spy), common.interpreted(lanes=LANES):
        jax.make_jaxpr(lambda c: function(c))(case)
    (forward_sizes,) = sizes
    return forward_sizes


def test_residuals_are_saved_only_for_a_gradient():
    case = jax.tree.map(jnp.asarray, make_case(B=2, T=3, H=2, K=8))
    h, state, steps = 2 * 4 * 16, 4 * 2 * 16, 2 * 3 * 16
    assert forward_output_sizes(run, case) == [h, state, 1, 1]
    for save_gates, gates in ((True, 4 * steps), (False, 1)):
        gradient = functools.partial(slstm_cases.value_and_gradients, backends.triton())
        with slstm_cases.saving_gates(save_gates):
            assert forward_output_sizes(gradient, case) == [h, state, 3 * steps, gates]


def test_kernels_are_compiled_for_the_ahead_of_time_target():
    """The gradient too, although it is traced outside of the `compiled_for` context."""
    settings_by_kernel = {}

    def call(kernel, arrays, out_shape, *, name, **settings):
        settings_by_kernel[name] = settings
        return tuple(jnp.zeros(x.shape, x.dtype) for x in out_shape)

    def forward(c):
        with common.compiled_for("sm_90"):
            return run(c)[0]

    case = jax.tree.map(jnp.asarray, make_case(T=2, K=256))
    with mock.patch.object(gpu, "call", call):
        jax.eval_shape(jax.grad(lambda c: jnp.sum(forward(c) * c.dh)), case)
        jax.eval_shape(forward, jax.tree.map(jnp.asarray, make_case(T=1)))
    assert set(settings_by_kernel) == {*FORWARD, *BACKWARD, *DECODE}
    for settings in settings_by_kernel.values():
        assert settings["target"] == "sm_90" and not settings["interpret"]
        assert not settings["UPCAST"]
