"""`vmap` over each argument, `lax.scan` with the state as carry, and donated states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from tests.modules.models import config
from tests.ops.subjects import KERNELS
from tests.transformations.cases import (
    BY_NAME,
    LAYERS,
    B,
    D,
    T,
    assert_close,
    each_case,
    is_differentiable,
    layer,
    loss,
    outputs,
    split_floats,
)
from xlstm_jax import cells
from xlstm_jax.modules import LM

TOLERANCE = {"float32": 1e-4, "float64": 1e-10}


def assert_vmap_equals_a_loop(fn, case, compiled) -> None:
    """`fn(arguments)`, mapped over each argument alone, equals `compiled` of each of its values."""
    first, second = case.arguments(), case.arguments(seed=1)

    def mapped(first, second):
        results = {}
        for name in first:
            stacked = jax.tree.map(lambda *x: jnp.stack(x), first[name], second[name])
            one = lambda x, name=name: fn({**first, name: x})  # noqa: E731
            results[name] = jax.vmap(one)(stacked)
        return results

    results, base = quick.jit(mapped)(first, second), compiled(first)
    for name, result in results.items():
        for index, expected in enumerate((base, compiled({**first, name: second[name]}))):
            actual = jax.tree.map(lambda x, index=index: x[index], result)
            assert_close(actual, expected, TOLERANCE[case.dtype])


@each_case()
def test_vmap_over_each_argument_equals_a_loop(case):
    assert_vmap_equals_a_loop(case.run, case, outputs(case.name))


@each_case(is_differentiable, slow=("",), exhaustive=("Layer", "LM-", "_scan"))
def test_vmap_of_the_gradient_over_each_argument_equals_a_loop(case):
    def gradient(arguments):
        return jax.grad(functools.partial(loss, case))(*split_floats(case, arguments))

    assert_vmap_equals_a_loop(gradient, case, quick.jit(gradient))


@each_case(is_differentiable, slow=("",), exhaustive=(*KERNELS, "Layer", "LM-", "_scan"))
def test_gradient_of_vmap_is_that_of_each_element(case):
    """All arguments mapped: reverse mode outside of `vmap`, where the test above has it inside."""
    calls = case.arguments(), case.arguments(seed=1)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *calls)
    floats, others = split_floats(case, stacked)

    def total(floats):
        return jnp.sum(jax.vmap(functools.partial(loss, case))(floats, others))

    def gradient(arguments):
        return jax.grad(functools.partial(loss, case))(*split_floats(case, arguments))

    actual, compiled = quick.jit(jax.grad(total))(floats), quick.jit(gradient)
    for index, arguments in enumerate(calls):
        result = jax.tree.map(lambda x, index=index: x[index], actual)
        assert_close(result, compiled(arguments), TOLERANCE[case.dtype])


@each_case(lambda case: case.has_state)
def test_scan_with_the_state_as_carry_equals_one_call(case):
    """A step scans over T positions, the other functions over two halves of a sequence."""
    arguments = case.arguments()
    state = arguments.pop("state")
    if case.is_step:
        sequence = BY_NAME[case.name.replace("step", "scan")].arguments(dtype=case.dtype)
        del sequence["reset"], sequence["mask"]
        timed = {name: sequence[name] for name in case.batched if name != "state"}
        expected = outputs(case.name.replace("step", "scan"))({**sequence, "state": state})
    else:
        timed = {name: arguments[name] for name in case.timed}
        expected = outputs(case.name)({**arguments, "state": state})
    length = 1 if case.is_step else T // 2
    rest = {name: x for name, x in arguments.items() if name not in timed}
    parts = {
        name: jnp.moveaxis(x.reshape(B, T // length, length, *x.shape[2:]), 1, 0)
        for name, x in timed.items()
    }

    def body(state, part):
        if case.is_step:
            part = {name: x[:, 0] for name, x in part.items()}
        y, state = case.run({**rest, **part, "state": state})
        return state, y[:, None] if case.is_step else y

    state, y = quick.jit(lambda s, parts: jax.lax.scan(body, s, parts))(state, parts)
    y = jnp.moveaxis(y, 0, 1)
    actual = y.reshape(B, T, *y.shape[3:]), state
    assert_close(actual, expected, TOLERANCE[case.dtype])


@each_case(lambda case: case.has_state)
def test_donated_state_is_reused(case):
    arguments = case.arguments()
    expected = outputs(case.name)(arguments)
    state = jax.tree.map(jnp.copy, arguments.pop("state"))

    def run(state, arguments):
        return case.run({**arguments, "state": state})

    actual = quick.jit(run, donate_argnums=0)(state, arguments)
    assert_close(actual, expected, TOLERANCE[case.dtype])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


INITIAL_STATES = {
    "lstm_init": lambda dtype: cells.lstm_init(B, 2, 3, dtype),
    "slstm_init": lambda dtype: cells.slstm_init(B, 2, 3, dtype),
    "mlstm_init": lambda dtype: cells.mlstm_init(B, 2, 3, 3, dtype),
    **{name: lambda dtype, name=name: layer(name).init_state(B, D, dtype) for name in LAYERS},
    "LM": lambda dtype: LM(config("mmssMM")).init_state(B),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", INITIAL_STATES)
def test_every_leaf_of_an_initial_state_has_its_own_buffer(name, dtype):
    leaves = jax.tree.leaves(INITIAL_STATES[name](dtype))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    state = INITIAL_STATES[name](dtype)
    donated = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(donated))
