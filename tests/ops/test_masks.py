"""Masked steps do not affect the state, h or gradients, whatever their inputs are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import runs
from tests.ops.subjects import (
    PRIMARY,
    T,
    both_dtypes,
    drop_masked,
    make_case,
    pad,
    subjects,
    with_flags,
)
from tests.ops.tolerances import TABLE
from xlstm_jax import cells, ops


def _with_garbage(case):
    """NaN in all inputs, and a reset, at every masked step."""
    inputs = {}
    for name, x in case.inputs.items():
        inputs[name] = np.where(case.mask.reshape(case.mask.shape + (1,) * (x.ndim - 2)), x, np.nan)
    return case._replace(inputs=inputs, reset=case.reset | ~case.mask)


@subjects(quick=PRIMARY)
def test_masked_sequence_equals_the_sequence_without_masked_positions(subject):
    dtype = subject.widest_dtype
    tol, options = TABLE[dtype], subject.exact(dtype)
    case = with_flags(make_case(subject.variant, T), num_masked=13)
    assert (case.reset & ~case.mask).any() and (case.reset & case.mask).any()
    shorter = drop_masked(case)
    cotangents = runs.random_cotangents(subject.variant, case, **options)
    drop = lambda x: x[case.mask].reshape((-1, shorter.length) + x.shape[2:])  # noqa: E731
    masked = runs.run(subject, case, cotangents, dtype, **options)
    loss = cotangents._replace(h=drop(cotangents.h))
    expected = runs.run(subject, shorter, loss, dtype, **options)
    assert not masked.h[~case.mask].any()
    gradients = dict(masked.gradients)
    for name in case.inputs:
        assert not gradients[name][~case.mask].any(), f"d{name} is not 0 where masked"
        gradients[name] = drop(gradients[name])
    actual = runs.Result(drop(masked.h), masked.state, gradients)
    runs.assert_results_close(actual, expected, tol)


@both_dtypes
@subjects(quick=PRIMARY)
def test_inputs_of_masked_steps_do_not_change_results(subject, dtype):
    options = subject.exact(dtype)
    case = with_flags(make_case(subject.variant, T), num_masked=13)
    cotangents = runs.random_cotangents(subject.variant, case, **options)
    clean = runs.run(subject, case, cotangents, dtype, **options)
    garbage = runs.run(subject, _with_garbage(case), cotangents, dtype, **options)
    jax.tree.map(np.testing.assert_array_equal, garbage, clean)


@both_dtypes
@subjects()
def test_fully_masked_sequence_leaves_the_state_bit_identical(subject, dtype):
    options = subject.exact(dtype)
    case = pad(make_case(subject.variant, T), T)
    case.mask[:] = False
    if subject.options.get("input_gate") == "sigmoid":  # its states have m = 0
        case = case._replace(state=case.state._replace(m=np.zeros_like(case.state.m)))
    cotangents = runs.random_cotangents(subject.variant, case, stored=True, **options)
    result = runs.run(subject, _with_garbage(case), cotangents, dtype, **options)
    jax.tree.map(np.testing.assert_array_equal, result.state, case.state)
    assert not result.h.any()
    for name in (*case.inputs, *case.weights):
        assert not result.gradients[name].any(), f"d{name} is not 0"


@subjects(quick=PRIMARY)
def test_masked_steps_at_the_end_leave_the_state_bit_identical(subject):
    """The state is that after t valid steps, whatever number of masked steps follows."""
    case = pad(make_case(subject.variant, T), T)
    for t in (8, 13, 24):
        case.mask[:] = np.arange(T) < t
        masked = runs.run(subject, case, runs.zero_cotangents(subject.variant, case))
        again = case._replace(state=masked.state, mask=np.zeros_like(case.mask))
        result = runs.run(subject, again, runs.zero_cotangents(subject.variant, case))
        jax.tree.map(np.testing.assert_array_equal, result.state, masked.state)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int32", "float32", "numpy"])
@pytest.mark.parametrize("op", ["mlstm", "slstm", "lstm"])
def test_nonzero_numbers_are_true(op, dtype):
    """Masks are often document numbers, 1, 1, 2, 2, 0, and resets integers."""
    case = with_flags(make_case(op, 9), num_masked=3)
    arguments = {name: jnp.asarray(x, jnp.float32) for name, x in case.inputs.items()}
    arguments |= {name: jnp.asarray(x, jnp.float32) for name, x in case.weights.items()}
    booleans = {"reset": jnp.asarray(case.reset), "mask": jnp.asarray(case.mask)}
    if dtype == "numpy":
        numbers = {"reset": case.reset, "mask": np.where(case.mask, 2, 0)}
    else:
        numbers = {name: jnp.asarray(2 * flag, dtype) for name, flag in booleans.items()}
    for call in (getattr(ops, op), getattr(cells, f"{op}_scan")):
        expected, actual = call(**arguments, **booleans), call(**arguments, **numbers)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
