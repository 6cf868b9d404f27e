"""The mLSTM TPU decode kernel, interpreted, against the cell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common
from pallas_kernels.mlstm import backends, tpu_decode
from tests import quick
from tests.kernels import mlstm_cases
from tests.kernels.calls import calls
from tests.kernels.mlstm_cases import (
    LANES,
    STRICT,
    assert_results_match,
    assert_step_matches_cell,
    make_case,
    make_step_case,
    reference,
)

# Interpreted kernels are slow; quick cases are in tests/ops.
pytestmark = pytest.mark.slow

kernel = functools.partial(mlstm_cases.interpret, backends.tpu())
run = functools.partial(mlstm_cases.run, backends.tpu())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_one_step_matches_the_cell(forget_gate, flags, dtype):
    case, options = make_step_case(dtype), {"forget_gate": forget_gate}
    if not flags:
        case = jax.tree.map(lambda x: x[:2], case)._replace(reset=None, mask=None)
    with common.interpreted(lanes=LANES):
        actual = quick.jit(functools.partial(run, **options))(jax.tree.map(jnp.asarray, case))
    assert_step_matches_cell(case, actual, **options)


@pytest.mark.parametrize(
    "options", [{"normalize": False}, {"eps": 0.5}, {}, {"forget_gate": "exp"}], ids=str
)
def test_one_step_with_sigmoid_input_gate_matches_the_cell(options):
    case = make_step_case()
    case = jax.tree.map(lambda x: x[:2], case._replace(mask=None))
    options = {"input_gate": "sigmoid", **options}
    with common.interpreted(lanes=LANES):
        actual = quick.jit(functools.partial(run, **options))(jax.tree.map(jnp.asarray, case))
    assert_step_matches_cell(case, actual, **options)


def test_column_blocks_of_the_matrix_memory_match_the_cell(monkeypatch):
    """V = 384 is split into three blocks of 128; n is computed by one of them."""
    monkeypatch.setattr(tpu_decode, "BLOCK_BYTES", 4 * 8 * 128)
    case = make_step_case(K=8, V=384)
    (call,) = calls(run, jax.tree.map(jnp.asarray, case))
    assert call.params["grid_mapping"].grid == (5, 3, 3)
    with common.interpreted(lanes=LANES):
        actual = quick.jit(run)(jax.tree.map(jnp.asarray, case))
    assert_step_matches_cell(case, actual)


@pytest.mark.parametrize("K,V", [(8, 8), (256, 512), (512, 1024), (1280, 1280), (96, 100), (96, 7)])
def test_column_blocks_divide_v_and_fit_the_block_size(K, V):
    case = make_case(B=1, T=1, H=1, K=K, V=V)
    (call,) = calls(run, jax.tree.map(jnp.asarray, case))
    columns = V // call.params["grid_mapping"].grid[2]
    assert V % columns == 0
    assert columns == V or columns % common.LANES == 0
    assert 4 * K * columns <= tpu_decode.BLOCK_BYTES


def test_one_step_updates_the_state_in_place():
    """C and n, reshaped at most, alias results of the same shape."""
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    (call,) = calls(run, case)
    aliases = dict(call.params["input_output_aliases"])
    assert aliases == {4: 1, 5: 2}
    for operand, result in aliases.items():
        assert call.invars[operand].aval == call.outvars[result].aval
    assert [call.outvars[number].aval.shape for number in (1, 2)] == [(2, 2, 6, 10), (2, 2, 1, 6)]


def test_one_step_uses_the_decode_kernel_unless_differentiated():
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    names = lambda function: [call.params["name"] for call in calls(function, case)]  # noqa: E731
    assert names(run) == ["mlstm_decode"]
    gradient = jax.grad(lambda c: run(c)[0].sum())
    assert names(gradient) == ["mlstm_forward", "mlstm_backward"]


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_gradients_of_one_step_match_the_cell(flags):
    case = make_case(B=4, T=1)
    if flags:
        reset, mask = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool)[..., None]
        case = case._replace(reset=reset, mask=mask)
    assert_results_match(kernel(case), reference(case))


@pytest.mark.parametrize("interpreter", STRICT.values(), ids=STRICT)
def test_one_step_reads_no_uninitialized_memory_and_has_no_races(interpreter, monkeypatch, capfd):
    monkeypatch.setattr(tpu_decode, "BLOCK_BYTES", 4 * 8 * 128)
    case = make_step_case(K=8, V=256)
    with common.interpreted(interpreter, lanes=LANES):
        actual = quick.jit(run)(jax.tree.map(jnp.asarray, case))
    assert_step_matches_cell(case, actual)
    assert "RACE DETECTED" not in capfd.readouterr().out
