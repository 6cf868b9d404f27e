"""Triton's interpreter as `gpu.call` uses it, and the watch that tests keep on its memory."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from tests.kernels.triton_interpreter import Launch, launches, race_detector

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

REFUSAL = gpu.interpreter_refusal()
pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))

SIZE = 8


@triton.jit
def _first(x, out, SIZE: tl.constexpr):
    """The first element alone."""
    tl.store(out, tl.load(x))


@triton.jit
def _add(x, y, out, SIZE: tl.constexpr):
    """In place: the result takes the place of x."""
    at = tl.arange(0, SIZE)
    tl.store(x + at, tl.load(x + at) + tl.load(y + at))


@triton.jit
def _number(x, out, SIZE: tl.constexpr):
    """Each program its number, on three axes."""
    number = tl.program_id(0) * 100 + tl.program_id(1) * 10 + tl.program_id(2)
    place = (tl.program_id(0) * 3 + tl.program_id(1)) * 2 + tl.program_id(2)
    tl.store(out + place, number.to(tl.float32) + tl.load(x))


@triton.jit
def _turn(x, out, SIZE: tl.constexpr, OFFSET: tl.constexpr, MASKED: tl.constexpr):
    """Program by program from x, OFFSET elements on."""
    at = tl.program_id(0) + OFFSET
    inside = at < SIZE if MASKED else at >= 0
    tl.store(out + tl.program_id(0), tl.load(x + at, inside, other=0.0))


@triton.jit
def _shared(x, out, SIZE: tl.constexpr, READ: tl.constexpr):
    """Every program the same element, or its own and then that of the first program."""
    mine = tl.program_id(0) if READ else tl.program_id(0) * 0
    tl.store(out + mine, tl.load(x))
    if READ:
        tl.store(out + SIZE + tl.program_id(0), tl.load(out))


def call(kernel, *arrays, shape=(SIZE,), dtype=jnp.float32, grid=(1,), **settings):
    settings = dict(SIZE=SIZE) | settings
    results = gpu.call(
        kernel,
        tuple(map(jnp.asarray, arrays)),
        (jax.ShapeDtypeStruct(shape, dtype),),
        name="of_a_test",
        grid=grid,
        interpret=True,
        **settings,
    )
    return results[0]


X = np.arange(1, 1 + SIZE, dtype=np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_no_program_writes_is_nan(dtype):
    found = np.asarray(call(_first, X.astype(dtype), dtype=jnp.dtype(dtype)), "float32")
    np.testing.assert_array_equal(found, [1] + [np.nan] * (SIZE - 1))


def test_integers_that_no_program_writes_are_minus_one():
    found = call(_first, X.astype(np.int32), dtype=jnp.int32)
    np.testing.assert_array_equal(found, [1] + [-1] * (SIZE - 1))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_result_in_place_of_an_array_starts_with_its_contents(jit):
    """And the array that was given stays what it was."""
    x, y = jnp.asarray(X), jnp.asarray(10 * X)
    add = functools.partial(call, _add, aliases={0: 0})
    found = (jax.jit(add) if jit else add)(x, y)
    np.testing.assert_array_equal(found, 11 * X)
    np.testing.assert_array_equal(x, X)


def test_arrays_in_the_callers_own_memory_are_not_written(monkeypatch):
    """Today a callback is given copies; nothing says that it always will be."""
    x, y = X.copy(), 10 * X
    monkeypatch.setattr(jax, "pure_callback", lambda run, *_: tuple(map(jnp.asarray, run(x, y))))
    np.testing.assert_array_equal(call(_add, x, y, aliases={0: 0}), 11 * X)
    np.testing.assert_array_equal(x, X)


def test_the_grid_has_up_to_three_axes():
    found = call(_number, np.zeros(1, np.float32), shape=(2, 3, 2), grid=(2, 3, 2))
    expected = [100 * i + 10 * j + k for i, j, k in np.ndindex(2, 3, 2)]
    np.testing.assert_array_equal(np.ravel(found), expected)


def test_threads_do_not_mix_their_programs_up():
    compute = jax.jit(functools.partial(call, _number, shape=(2, 3, 2), grid=(2, 3, 2)))
    expected = np.reshape([100 * i + 10 * j + k for i, j, k in np.ndindex(2, 3, 2)], (2, 3, 2))
    with ThreadPoolExecutor(4) as pool:
        starts = [np.full(1, 1000 * number, np.float32) for number in range(32)]
        for start, found in zip(starts, pool.map(compute, starts), strict=True):
            np.testing.assert_array_equal(found, expected + start)


# The watch


def test_launches_are_recorded_in_order():
    twice = lambda x: call(_first, call(_number, x, grid=(1, 3)))  # noqa: E731
    assert launches(twice, X) == [Launch("of_a_test", (1, 3)), Launch("of_a_test", (1,))]


def faults(kernel, *, grid=(4,), **settings) -> list[str]:
    with race_detector() as found:
        jax.block_until_ready(call(kernel, X, shape=(2 * SIZE,), grid=grid, **settings))
    return found


def test_programs_that_keep_to_themselves_have_no_faults():
    assert faults(_turn, OFFSET=4, MASKED=False) == []
    assert faults(_turn, OFFSET=6, MASKED=True) == []


def test_an_address_outside_of_the_arrays_is_a_fault():
    found = faults(_turn, OFFSET=6, MASKED=False)
    assert len(found) == 2 and all("outside" in fault or "beyond" in fault for fault in found)


def test_an_element_that_two_programs_write_is_a_fault():
    assert "program (1, 0, 0) writes what another one writes" in faults(_shared, READ=False)


def test_an_element_that_one_program_writes_and_another_reads_is_a_fault():
    assert "program (1, 0, 0) reads what another one writes" in faults(_shared, READ=True)
