"""Matrix products, also within groups of features: values, gradients and dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from xlstm_jax import ops


def value_and_grads(call, *args):
    """Value and gradients, by every argument, of the sum of the sines of all outputs."""
    loss = lambda *args: jnp.sum(jnp.sin(call(*args)))  # noqa: E731
    return quick.jit(jax.value_and_grad(loss, tuple(range(len(args)))))(*args)


def per_group(x, kernel):
    """The product of each group of features with its own matrix."""
    P, d_in, d_out = kernel.shape
    y = jnp.einsum("...PI,PIO->...PO", x.reshape(*x.shape[:-1], P, d_in), kernel)
    return y.reshape(*x.shape[:-1], P * d_out)


def assert_same(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3, 4), (2, 16)])
def test_dense_and_its_gradients_equal_the_matrix_product(batch, rng, x64):
    x, kernel = jnp.asarray(rng.standard_normal((*batch, 5))), jnp.asarray(rng.random((5, 7)))
    assert_same(
        value_and_grads(ops.dense, x, kernel), value_and_grads(lambda x, w: x @ w, x, kernel)
    )


# Small groups; then groups combined into one tile, into several, and too wide to be combined.
@pytest.mark.parametrize(
    "groups,d_in,d_out",
    [(6, 4, 4), (1, 5, 3), (6, 12, 12), (130, 12, 10), (3, 200, 8)],
)
def test_groups_do_not_mix(groups, d_in, d_out, rng, x64):
    x = jnp.asarray(rng.standard_normal((2, 3, groups * d_in)))
    kernel = jnp.asarray(rng.standard_normal((groups, d_in, d_out)))
    assert_same(
        value_and_grads(ops.grouped_dense, x, kernel), value_and_grads(per_group, x, kernel)
    )


def test_gradient_of_small_groups_sums_over_all_positions(rng, x64):
    """More positions than one block of the sum, and not a multiple; outputs wider than inputs."""
    x, kernel = jnp.asarray(rng.standard_normal((5, 7, 9))), jnp.asarray(rng.random((3, 3, 4)))
    assert_same(
        value_and_grads(ops.grouped_dense, x, kernel), value_and_grads(per_group, x, kernel)
    )


@pytest.mark.parametrize("width", [4, 12, 256])
def test_grouped_dense_of_bfloat16_can_return_float32(width, rng):
    x = jnp.asarray(rng.standard_normal((4, 3 * width)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((3, width, width)), jnp.float32)
    assert jax.eval_shape(ops.grouped_dense, x, kernel).dtype == jnp.bfloat16
    y = quick.jit(functools.partial(ops.grouped_dense, dtype=jnp.dtype("float32")))(x, kernel)
    assert y.dtype == jnp.float32
    rounded = np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    expected = per_group(np.asarray(x, np.float64), rounded)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert_gradients_have_the_dtypes_of_arguments(ops.grouped_dense, x, kernel)


def assert_gradients_have_the_dtypes_of_arguments(product, *args):
    loss = lambda *args: product(*args).sum().astype(jnp.float32)  # noqa: E731
    gradients = jax.eval_shape(jax.grad(loss, (0, 1)), *args)
    assert [g.dtype for g in gradients] == [a.dtype for a in args]


def test_gradients_under_vmap_equal_those_of_a_loop(rng, x64):
    """Several training runs in one program: both inputs and weights have the mapped axis."""
    x, kernels = jnp.asarray(rng.standard_normal((4, 3, 5))), jnp.asarray(rng.random((4, 5, 7)))
    step = jax.grad(lambda x, w: jnp.sum(jnp.sin(ops.dense(x, w))), (0, 1))
    mapped = quick.jit(jax.vmap(step))(x, kernels)
    looped = [quick.jit(step)(a, b) for a, b in zip(x, kernels, strict=True)]
    assert_same(mapped, jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped))


def test_dense_of_bfloat16_can_return_float32(rng):
    x = jnp.asarray(rng.standard_normal((4, 512)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((512, 8)), jnp.float32)
    assert ops.dense(x, kernel).dtype == jnp.bfloat16
    y = ops.dense(x, kernel, dtype=jnp.dtype("float32"))
    assert y.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert_gradients_have_the_dtypes_of_arguments(ops.dense, x, kernel)
