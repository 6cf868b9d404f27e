"""Triton's interpreter as `gpu.call` uses it, and the tests' race detector."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from tests.kernels.triton_interpreter import Launch, launches, race_detector, shared_buffers

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

REFUSAL = gpu.interpreter_refusal()
pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))

SIZE = 8


@triton.jit
def _first(x, out, SIZE: tl.constexpr):
    """Copies the first element only."""
    tl.store(out, tl.load(x))


@triton.jit
def _add_previous(x, out, SIZE: tl.constexpr):
    """Each program adds the previous element of x to its own."""
    index = tl.program_id(0)
    previous = tl.load(x + index - 1, index > 0, other=0.0)
    tl.store(out + index, tl.load(x + index) + previous)


@triton.jit
def _program_id(x, out, SIZE: tl.constexpr):
    """Each program stores its id on three axes, as three decimal digits, plus x[0]."""
    number = tl.program_id(0) * 100 + tl.program_id(1) * 10 + tl.program_id(2)
    index = (tl.program_id(0) * 3 + tl.program_id(1)) * 2 + tl.program_id(2)
    tl.store(out + index, number.to(tl.float32) + tl.load(x))


@triton.jit
def _copy(x, out, SIZE: tl.constexpr, OFFSET: tl.constexpr, MASKED: tl.constexpr):
    """Each program copies one element, OFFSET elements further on in x."""
    index = tl.program_id(0) + OFFSET
    mask = index < SIZE if MASKED else index >= 0
    tl.store(out + tl.program_id(0), tl.load(x + index, mask, other=0.0))


@triton.jit
def _race(x, out, SIZE: tl.constexpr, READ: tl.constexpr):
    """All programs write one element; or, if READ, they read what the first program writes."""
    index = tl.program_id(0) if READ else tl.program_id(0) * 0
    tl.store(out + index, tl.load(x))
    if READ:
        tl.store(out + SIZE + tl.program_id(0), tl.load(out))


def call(kernel, *arrays, shape=(SIZE,), dtype=jnp.float32, grid=(1,), **settings):
    """The result of an interpreted kernel."""
    settings = dict(SIZE=SIZE) | settings
    results = gpu.call(
        kernel,
        tuple(map(jnp.asarray, arrays)),
        (jax.ShapeDtypeStruct(shape, dtype),),
        name="test_kernel",
        grid=grid,
        interpret=True,
        **settings,
    )
    return results[0]


X = np.arange(1, 1 + SIZE, dtype=np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_uninitialized_floats_are_nan(dtype):
    result = np.asarray(call(_first, X.astype(dtype), dtype=jnp.dtype(dtype)), "float32")
    np.testing.assert_array_equal(result, [1] + [np.nan] * (SIZE - 1))


def test_uninitialized_integers_are_minus_one():
    result = call(_first, X.astype(np.int32), dtype=jnp.int32)
    np.testing.assert_array_equal(result, [1] + [-1] * (SIZE - 1))


def test_grid_supports_three_axes():
    result = call(_program_id, np.zeros(1, np.float32), shape=(2, 3, 2), grid=(2, 3, 2))
    expected = [100 * i + 10 * j + k for i, j, k in np.ndindex(2, 3, 2)]
    np.testing.assert_array_equal(np.ravel(result), expected)


def test_interpreter_is_thread_safe():
    compute = jax.jit(functools.partial(call, _program_id, shape=(2, 3, 2), grid=(2, 3, 2)))
    expected = np.reshape([100 * i + 10 * j + k for i, j, k in np.ndindex(2, 3, 2)], (2, 3, 2))
    with ThreadPoolExecutor(4) as pool:
        starts = [np.full(1, 1000 * number, np.float32) for number in range(32)]
        for start, result in zip(starts, pool.map(compute, starts), strict=True):
            np.testing.assert_array_equal(result, expected + start)


# Recorded launches and the race detector


def test_launches_are_recorded_in_order():
    twice = lambda x: call(_first, call(_program_id, x, grid=(1, 3)))  # noqa: E731
    assert launches(twice, X) == [Launch("test_kernel", (1, 3)), Launch("test_kernel", (1,))]


def detected_errors(kernel, *, grid=(4,), **settings) -> list[str]:
    """The errors of the race detector for one launch."""
    with race_detector() as errors:
        jax.block_until_ready(call(kernel, X, shape=(2 * SIZE,), grid=grid, **settings))
    return errors


def test_independent_programs_have_no_errors():
    assert detected_errors(_copy, OFFSET=4, MASKED=False) == []
    assert detected_errors(_copy, OFFSET=6, MASKED=True) == []


def test_out_of_bounds_access_is_detected():
    errors = detected_errors(_copy, OFFSET=6, MASKED=False)
    assert len(errors) == 2 and all("outside" in error or "beyond" in error for error in errors)


def test_write_write_race_is_detected():
    error = "program (1, 0, 0) writes an element that another program writes"
    assert error in detected_errors(_race, READ=False)


def test_read_write_race_is_detected():
    error = "program (1, 0, 0) reads an element that another program writes"
    assert error in detected_errors(_race, READ=True)


def test_programs_see_each_others_results_in_a_shared_buffer():
    def add_previous():
        return call(_add_previous, X, grid=(SIZE,))

    np.testing.assert_array_equal(add_previous(), X + np.append(0, X[:-1]))
    with shared_buffers():
        np.testing.assert_array_equal(add_previous(), np.cumsum(X))
