"""Derivatives of every row: first and second ones, forward and reverse, and under a checkpoint.

Expected are central differences in float64, of the loss and of its gradient.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests import quick
from tests.transformations.rows import (
    BY_NAME,
    Row,
    assert_close,
    each_row,
    gradient,
    is_differentiable,
    loss,
    split_floats,
    value,
)


def on_cpu(row: Row) -> bool:
    """Differentiable by every transformation: all rows but the kernels."""
    return is_differentiable(row) and not row.is_kernel


def direction(row: Row):
    """A tangent of the differentiable arguments: other random values of the same shapes."""
    return split_floats(row, row.arguments(seed=1))[0]


def inner(a, b) -> jax.Array:
    return sum(jnp.vdot(*pair) for pair in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def difference(fn, row: Row, step: float):
    """The derivative of `fn` along `direction`, by a central difference."""
    floats, rest = split_floats(row, row.arguments())
    after, before = (
        fn(jax.tree.map(lambda x, dx: x + s * dx, floats, direction(row)), rest)  # noqa: B023
        for s in (step, -step)
    )
    return jax.tree.map(lambda a, b: (a - b) / (2 * step), after, before)


@each_row(on_cpu)
def test_vjp_equals_differences(row):
    floats, rest = split_floats(row, row.arguments())
    actual = inner(gradient(row.name)(floats, rest), direction(row))
    assert_close(actual, difference(value(row.name), row, 1e-6), 1e-7)


@each_row(lambda row: row.is_kernel)
def test_vjp_of_a_kernel_equals_that_of_the_recurrence(row):
    floats, rest = split_floats(row, row.arguments())
    recurrence = BY_NAME[row.name.split("-")[0] + "-recurrent"]
    assert_close(gradient(row.name)(floats, rest), gradient(recurrence.name)(floats, rest), 1e-4)


@each_row(lambda row: row.is_kernel, slow=())
def test_forward_mode_of_a_kernel_raises(row):
    floats, rest = split_floats(row, row.arguments())
    fn = functools.partial(loss, row, rest=rest)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda x: jax.jvp(fn, (x,), (x,))).lower(floats)


@each_row(lambda row: row.is_kernel, slow=())
def test_second_derivative_of_a_kernel_raises(row):
    floats, rest = split_floats(row, row.arguments())
    grad = jax.grad(functools.partial(loss, row, rest=rest))
    forward = lambda x: jax.jvp(grad, (x,), (x,))  # noqa: E731
    reverse = jax.grad(lambda x: inner(grad(x), x))
    for fn in (forward, reverse):
        with pytest.raises(TypeError, match="first derivatives in reverse mode only"):
            jax.eval_shape(fn, floats)


@each_row(on_cpu)
def test_jvp_and_linearize_equal_differences(row):
    floats, rest = split_floats(row, row.arguments())
    fn = functools.partial(loss, row, rest=rest)

    def tangents(floats, dx):
        return jax.jvp(fn, (floats,), (dx,))[1], jax.linearize(fn, floats)[1](dx)

    expected = difference(value(row.name), row, 1e-6)
    assert_close(quick.jit(tangents)(floats, direction(row)), (expected, expected), 1e-7)


@each_row(on_cpu)
def test_jacfwd_equals_the_gradient(row):
    floats, rest = split_floats(row, row.arguments())
    # A Jacobian takes one tangent per element: of the argument with the fewest elements.
    name = min(floats, key=lambda name: sum(x.size for x in jax.tree.leaves(floats[name])))

    def jacobian(x):
        return jax.jacfwd(lambda x: loss(row, {**floats, name: x}, rest))(x)

    expected = gradient(row.name)(floats, rest)[name]
    assert_close(quick.jit(jacobian)(floats[name]), expected, 1e-9)


@each_row(on_cpu)
def test_hessian_vector_products_equal_differences_of_the_gradient(row):
    """Forward over reverse and reverse over reverse."""
    floats, rest = split_floats(row, row.arguments())
    grad = jax.grad(functools.partial(loss, row, rest=rest))

    def products(floats, dx):
        forward = jax.jvp(grad, (floats,), (dx,))[1]
        return forward, jax.grad(lambda x: inner(grad(x), dx))(floats)

    expected = difference(gradient(row.name), row, 1e-5)
    assert_close(quick.jit(products)(floats, direction(row)), (expected, expected), 1e-6)


@each_row(is_differentiable)
def test_gradient_under_a_checkpoint_equals_the_gradient(row):
    floats, rest = split_floats(row, row.arguments())
    fn = jax.checkpoint(functools.partial(loss, row, rest=rest))
    tolerance = 1e-5 if row.is_kernel else 1e-9
    expected = gradient(row.name)(floats, rest)
    assert_close(quick.jit(jax.grad(fn))(floats), expected, tolerance)
