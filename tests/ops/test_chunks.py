"""The chunkwise implementation: chunk sizes, and the residuals of its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import runs
from tests.ops.subjects import Subject, make_case, with_flags
from tests.ops.tolerances import TABLE
from xlstm_jax import cells, ops

SUBJECT = Subject("mlstm", "chunkwise")


@pytest.mark.parametrize("chunk_size", [1, 3, 16, None])
def test_results_do_not_depend_on_the_chunk_size(chunk_size):
    case = with_flags(make_case("mlstm", 29), num_masked=5)
    options = {"chunk_size": chunk_size, **SUBJECT.exact("float64")}
    runs.assert_equals_the_recurrence(SUBJECT, case, TABLE["float64"], "float64", **options)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mlstm", "mlstm_sigmoid", "mlstm_unnormalized"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7, 8, 13, 16, 28, 29, 30, 64, None])
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_no_variant_depends_on_the_chunk_size(variant, chunk_size, flags):
    """Also at gate scales that forget at once, or remember for long."""
    subject = Subject(variant, "chunkwise")
    for seed, gate_scale in enumerate((0.1, 1.0, 5.0)):
        case = make_case(variant, 29, gate_scale=gate_scale, seed=seed)
        case = with_flags(case, num_masked=5, seed=seed) if flags else case
        options = {"chunk_size": chunk_size, **subject.exact("float64")}
        runs.assert_equals_the_recurrence(subject, case, TABLE["float64"], "float64", **options)


@pytest.mark.parametrize("where", ["every step", "chunk starts", "chunk ends"])
def test_resets_at_chunk_boundaries_equal_the_recurrence(where):
    case = with_flags(make_case("mlstm", 29), num_masked=0)
    steps = np.arange(29)
    pattern = {
        "every step": steps >= 0,
        "chunk starts": steps % 8 == 0,
        "chunk ends": steps % 8 == 7,
    }
    case.reset[:] = pattern[where]
    runs.assert_equals_the_recurrence(
        SUBJECT, case, TABLE["float64"], "float64", **SUBJECT.exact("float64")
    )


B, T, H, K, V = 1, 192, 2, 4, 6


def _residuals(chunk_size: int, *, flags: bool = False) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the residuals of a call with `T` positions."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    inputs = [shape(B, T, H, K), shape(B, T, H, K), shape(B, T, H, V), shape(B, T, H)]
    state = cells.MLSTMState(shape(B, H, K, V), shape(B, H, K), shape(B, H))
    options = dict(chunk_size=chunk_size, implementation="chunkwise")
    if flags:
        options |= dict(reset=jnp.zeros((B, T), bool), mask=jnp.ones((B, T), bool))
    call = functools.partial(ops.mlstm, **options)
    pullback = jax.eval_shape(lambda *args: jax.vjp(call, *args)[1], *inputs, inputs[-1], state)
    return [leaf for leaf in jax.tree.leaves(pullback) if leaf.size > 1]


def test_residuals_are_inputs_outputs_and_one_state_per_chunk():
    for chunk_size in (16, 32):
        saved = sum(leaf.size for leaf in _residuals(chunk_size))
        inputs = B * T * H * (2 * K + V + 2 + 2)  # q, k, v; gates, and derivatives of their logs
        outputs = B * T * H * (1 + 1 + V)  # m, d, h
        states = (T // chunk_size + 1) * B * H * (K * V + K + 1)
        assert inputs + outputs <= saved <= inputs + outputs + states


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_residuals_have_no_array_of_all_weights_within_chunks(flags):
    chunk_size = 32
    assert max(leaf.size for leaf in _residuals(chunk_size, flags=flags)) < B * T * chunk_size
