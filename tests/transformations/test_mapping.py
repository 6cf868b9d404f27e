"""`vmap` over each argument, `lax.scan` with the state as carry, and donated states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from tests.modules.models import config
from tests.ops.subjects import KERNELS
from tests.transformations.rows import (
    BY_NAME,
    LAYERS,
    B,
    D,
    T,
    assert_close,
    each_row,
    is_differentiable,
    layer,
    loss,
    outputs,
    split_floats,
)
from xlstm_jax import cells
from xlstm_jax.modules import LM

TOLERANCE = {"float32": 1e-4, "float64": 1e-10}


def assert_vmap_equals_a_loop(fn, row, compiled) -> None:
    """`fn(arguments)`, mapped over each argument alone, equals `compiled` of each of its values."""
    first, second = row.arguments(), row.arguments(seed=1)

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
            assert_close(actual, expected, TOLERANCE[row.dtype])


@each_row()
def test_vmap_over_each_argument_equals_a_loop(row):
    assert_vmap_equals_a_loop(row.run, row, outputs(row.name))


@each_row(is_differentiable, slow=("",), exhaustive=("Layer", "LM-", "_scan"))
def test_vmap_of_the_gradient_over_each_argument_equals_a_loop(row):
    def gradient(arguments):
        return jax.grad(functools.partial(loss, row))(*split_floats(row, arguments))

    assert_vmap_equals_a_loop(gradient, row, quick.jit(gradient))


@each_row(is_differentiable, slow=("",), exhaustive=(*KERNELS, "Layer", "LM-", "_scan"))
def test_gradient_of_vmap_is_that_of_each_element(row):
    """All arguments mapped: reverse mode outside of `vmap`, where the test above has it inside."""
    calls = row.arguments(), row.arguments(seed=1)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *calls)
    floats, others = split_floats(row, stacked)

    def total(floats):
        return jnp.sum(jax.vmap(functools.partial(loss, row))(floats, others))

    def gradient(arguments):
        return jax.grad(functools.partial(loss, row))(*split_floats(row, arguments))

    actual, compiled = quick.jit(jax.grad(total))(floats), quick.jit(gradient)
    for index, arguments in enumerate(calls):
        result = jax.tree.map(lambda x, index=index: x[index], actual)
        assert_close(result, compiled(arguments), TOLERANCE[row.dtype])


@each_row(lambda row: row.has_state)
def test_scan_with_the_state_as_carry_equals_one_call(row):
    """A step scans over T positions, the other functions over two halves of a sequence."""
    arguments = row.arguments()
    state = arguments.pop("state")
    if row.is_step:
        sequence = BY_NAME[row.name.replace("step", "scan")].arguments(dtype=row.dtype)
        del sequence["reset"], sequence["mask"]
        timed = {name: sequence[name] for name in row.batched if name != "state"}
        expected = outputs(row.name.replace("step", "scan"))({**sequence, "state": state})
    else:
        timed = {name: arguments[name] for name in row.timed}
        expected = outputs(row.name)({**arguments, "state": state})
    length = 1 if row.is_step else T // 2
    rest = {name: x for name, x in arguments.items() if name not in timed}
    parts = {
        name: jnp.moveaxis(x.reshape(B, T // length, length, *x.shape[2:]), 1, 0)
        for name, x in timed.items()
    }

    def body(state, part):
        if row.is_step:
            part = {name: x[:, 0] for name, x in part.items()}
        y, state = row.run({**rest, **part, "state": state})
        return state, y[:, None] if row.is_step else y

    state, y = quick.jit(lambda s, parts: jax.lax.scan(body, s, parts))(state, parts)
    y = jnp.moveaxis(y, 0, 1)
    actual = y.reshape(B, T, *y.shape[3:]), state
    assert_close(actual, expected, TOLERANCE[row.dtype])


@each_row(lambda row: row.has_state)
def test_donated_state_is_reused(row):
    arguments = row.arguments()
    expected = outputs(row.name)(arguments)
    state = jax.tree.map(jnp.copy, arguments.pop("state"))

    def run(state, arguments):
        return row.run({**arguments, "state": state})

    actual = quick.jit(run, donate_argnums=0)(state, arguments)
    assert_close(actual, expected, TOLERANCE[row.dtype])
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
