"""First and second derivatives of every function, forward and reverse, and under a checkpoint.

The reference is a central difference in float64, of the loss or of its gradient.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests import quick
from tests.transformations.cases import (
    BY_NAME,
    Case,
    assert_close,
    each_case,
    gradient,
    is_differentiable,
    loss,
    split_floats,
    value,
)


def on_cpu(case: Case) -> bool:
    """Differentiable by every transformation: everything but the kernels."""
    return is_differentiable(case) and not case.is_kernel


def direction(case: Case):
    """A tangent of the differentiable arguments: other random values of the same shapes."""
    return split_floats(case, case.arguments(seed=1))[0]


def inner(a, b) -> jax.Array:
    return sum(jnp.vdot(*pair) for pair in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def difference(fn, case: Case, step: float):
    """The derivative of `fn` along `direction`, by a central difference."""
    floats, rest = split_floats(case, case.arguments())
    after, before = (
        fn(jax.tree.map(lambda x, dx: x + s * dx, floats, direction(case)), rest)  # noqa: B023
        for s in (step, -step)
    )
    return jax.tree.map(lambda a, b: (a - b) / (2 * step), after, before)


@each_case(on_cpu)
def test_vjp_equals_differences(case):
    floats, rest = split_floats(case, case.arguments())
    actual = inner(gradient(case.name)(floats, rest), direction(case))
    assert_close(actual, difference(value(case.name), case, 1e-6), 1e-7)


@each_case(lambda case: case.is_kernel)
def test_vjp_of_a_kernel_equals_that_of_the_recurrence(case):
    floats, rest = split_floats(case, case.arguments())
    recurrence = BY_NAME[case.name.split("-")[0] + "-recurrent"]
    assert_close(gradient(case.name)(floats, rest), gradient(recurrence.name)(floats, rest), 1e-4)


@each_case(lambda case: case.is_kernel, slow=())
def test_forward_mode_of_a_kernel_raises(case):
    floats, rest = split_floats(case, case.arguments())
    fn = functools.partial(loss, case, rest=rest)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda x: jax.jvp(fn, (x,), (x,))).lower(floats)


@each_case(lambda case: case.is_kernel, slow=())
def test_second_derivative_of_a_kernel_raises(case):
    floats, rest = split_floats(case, case.arguments())
    grad = jax.grad(functools.partial(loss, case, rest=rest))
    forward = lambda x: jax.jvp(grad, (x,), (x,))  # noqa: E731
    reverse = jax.grad(lambda x: inner(grad(x), x))
    for fn in (forward, reverse):
        with pytest.raises(TypeError, match="first derivatives in reverse mode only"):
            jax.eval_shape(fn, floats)


@each_case(on_cpu)
def test_jvp_and_linearize_equal_differences(case):
    floats, rest = split_floats(case, case.arguments())
    fn = functools.partial(loss, case, rest=rest)

    def tangents(floats, dx):
        return jax.jvp(fn, (floats,), (dx,))[1], jax.linearize(fn, floats)[1](dx)

    expected = difference(value(case.name), case, 1e-6)
    assert_close(quick.jit(tangents)(floats, direction(case)), (expected, expected), 1e-7)


@each_case(on_cpu)
def test_jacfwd_equals_the_gradient(case):
    floats, rest = split_floats(case, case.arguments())
    # A Jacobian takes one tangent per element: of the argument with the fewest elements.
    name = min(floats, key=lambda name: sum(x.size for x in jax.tree.leaves(floats[name])))

    def jacobian(x):
        return jax.jacfwd(lambda x: loss(case, {**floats, name: x}, rest))(x)

    expected = gradient(case.name)(floats, rest)[name]
    assert_close(quick.jit(jacobian)(floats[name]), expected, 1e-9)


@each_case(on_cpu)
def test_hessian_vector_products_equal_differences_of_the_gradient(case):
    """Forward over reverse and reverse over reverse."""
    floats, rest = split_floats(case, case.arguments())
    grad = jax.grad(functools.partial(loss, case, rest=rest))

    def products(floats, dx):
        forward = jax.jvp(grad, (floats,), (dx,))[1]
        return forward, jax.grad(lambda x: inner(grad(x), dx))(floats)

    expected = difference(gradient(case.name), case, 1e-5)
    assert_close(quick.jit(products)(floats, direction(case)), (expected, expected), 1e-6)


@each_case(is_differentiable)
def test_gradient_under_a_checkpoint_equals_the_gradient(case):
    floats, rest = split_floats(case, case.arguments())
    fn = jax.checkpoint(functools.partial(loss, case, rest=rest))
    tolerance = 1e-5 if case.is_kernel else 1e-9
    expected = gradient(case.name)(floats, rest)
    assert_close(quick.jit(jax.grad(fn))(floats), expected, tolerance)
