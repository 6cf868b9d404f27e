"""Products with a weight matrix, and inside groups of features: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from xlstm_jax import ops


def slope_and_value(call, *args):
    """The sines of all outputs, summed: value and gradients to every argument."""
    loss = lambda *args: jnp.sum(jnp.sin(call(*args)))  # noqa: E731
    return quick.jit(jax.value_and_grad(loss, tuple(range(len(args)))))(*args)


def per_group(x, kernel):
    """Each group of features by its own matrix."""
    P, rows, columns = kernel.shape
    y = jnp.einsum("...PI,PIO->...PO", x.reshape(*x.shape[:-1], P, rows), kernel)
    return y.reshape(*x.shape[:-1], P * columns)


def assert_same(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3, 4), (2, 16)])
def test_a_product_and_its_gradients_equal_the_plain_ones(batch, rng, x64):
    x, kernel = jnp.asarray(rng.standard_normal((*batch, 5))), jnp.asarray(rng.random((5, 7)))
    assert_same(
        slope_and_value(ops.dense, x, kernel), slope_and_value(lambda x, w: x @ w, x, kernel)
    )


# Small groups; then groups joined to one block, to several, and too wide to be joined.
@pytest.mark.parametrize(
    "groups,rows,columns",
    [(6, 4, 4), (1, 5, 3), (6, 12, 12), (130, 12, 10), (3, 200, 8)],
)
def test_groups_do_not_mix(groups, rows, columns, rng, x64):
    x = jnp.asarray(rng.standard_normal((2, 3, groups * rows)))
    kernel = jnp.asarray(rng.standard_normal((groups, rows, columns)))
    assert_same(
        slope_and_value(ops.grouped_dense, x, kernel), slope_and_value(per_group, x, kernel)
    )


def test_the_gradient_of_small_groups_counts_every_row(rng, x64):
    """More rows than are summed at once, and no multiple of that; outputs wider than inputs."""
    x, kernel = jnp.asarray(rng.standard_normal((5, 7, 9))), jnp.asarray(rng.random((3, 3, 4)))
    assert_same(
        slope_and_value(ops.grouped_dense, x, kernel), slope_and_value(per_group, x, kernel)
    )


@pytest.mark.parametrize("width", [4, 12, 256])
def test_groups_of_bfloat16_may_be_accumulated_and_returned_in_float32(width, rng):
    x = jnp.asarray(rng.standard_normal((4, 3 * width)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((3, width, width)), jnp.float32)
    assert jax.eval_shape(ops.grouped_dense, x, kernel).dtype == jnp.bfloat16
    y = quick.jit(functools.partial(ops.grouped_dense, dtype=jnp.dtype("float32")))(x, kernel)
    assert y.dtype == jnp.float32
    rounded = np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    exact = per_group(np.asarray(x, np.float64), rounded)
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4)
    assert_gradients_have_the_dtypes_of_arguments(ops.grouped_dense, x, kernel)


def assert_gradients_have_the_dtypes_of_arguments(product, *args):
    loss = lambda *args: product(*args).sum().astype(jnp.float32)  # noqa: E731
    gradients = jax.eval_shape(jax.grad(loss, (0, 1)), *args)
    assert [g.dtype for g in gradients] == [a.dtype for a in args]


def test_gradients_of_a_mapped_product_are_those_of_a_loop(rng, x64):
    """Several trainings in one program: inputs and weights both have the mapped axis."""
    x, kernels = jnp.asarray(rng.standard_normal((4, 3, 5))), jnp.asarray(rng.random((4, 5, 7)))
    step = jax.grad(lambda x, w: jnp.sum(jnp.sin(ops.dense(x, w))), (0, 1))
    mapped = quick.jit(jax.vmap(step))(x, kernels)
    alone = [quick.jit(step)(a, b) for a, b in zip(x, kernels, strict=True)]
    assert_same(mapped, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))


def test_bfloat16_inputs_may_be_accumulated_and_returned_in_float32(rng):
    x = jnp.asarray(rng.standard_normal((4, 512)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((512, 8)), jnp.float32)
    assert ops.dense(x, kernel).dtype == jnp.bfloat16
    y = ops.dense(x, kernel, dtype=jnp.dtype("float32"))
    assert y.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4)
    assert_gradients_have_the_dtypes_of_arguments(ops.dense, x, kernel)
