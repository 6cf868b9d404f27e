"""Norms and the soft cap: formulas, gradients, dtypes and golden files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_files, quick
from xlstm_jax import ops

D = 24


def layer(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def rms(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


LAYER_NORM, RMS_NORM, MULTI_HEAD_NORM = (
    quick.jit(norm, static_argnames="eps")
    for norm in (ops.layer_norm, ops.rms_norm, ops.multi_head_norm)
)
NORMS = {"layer": (LAYER_NORM, layer), "rms": (RMS_NORM, rms)}
DIFFERENTIABLE = {"layer": ops.layer_norm, "rms": ops.rms_norm}  # without a nested jit
every_norm = pytest.mark.parametrize("name", NORMS)


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@every_norm
def test_norm_matches_its_formula(name, eps, rng, x64):
    norm, formula = NORMS[name]
    x = 3 * rng.standard_normal((2, 5, D)) + 1
    scale, bias = rng.standard_normal(D), rng.standard_normal(D)
    np.testing.assert_allclose(norm(jnp.asarray(x), eps=eps), formula(x, eps), rtol=1e-11)
    y = norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), eps=eps)
    np.testing.assert_allclose(y, formula(x, eps) * scale + bias, rtol=1e-11, atol=1e-13)


@every_norm
def test_gradient_of_a_norm_matches_central_differences(name, rng, x64):
    """Along one random direction."""
    norm = DIFFERENTIABLE[name]
    args = [jnp.asarray(rng.standard_normal(s)) for s in ((2, D), (D,), (D,))]
    steps = [jnp.asarray(rng.standard_normal(a.shape)) for a in args]
    loss = lambda *args: jnp.sum(jnp.sin(norm(*args, eps=1e-3)))  # noqa: E731
    gradients = quick.jit(jax.grad(loss, (0, 1, 2)))(*args)
    slope = sum(jnp.sum(g * s) for g, s in zip(gradients, steps, strict=True))
    value = quick.jit(loss)
    ahead, behind = (
        value(*(a + sign * 1e-6 * s for a, s in zip(args, steps, strict=True))) for sign in (1, -1)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-6)


@every_norm
def test_statistics_of_bfloat16_inputs_are_float32(name, rng):
    """With a mean far from zero, squares rounded to bfloat16 would lose the variance."""
    norm, formula = NORMS[name]
    x = jnp.asarray(50 + rng.standard_normal((4, 512)), jnp.bfloat16)
    y = norm(x, eps=1e-6)
    assert y.dtype == jnp.bfloat16
    expected = formula(np.asarray(x, np.float64), 1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=1e-2, atol=1e-2)


@every_norm
def test_zero_vector_has_a_finite_norm_and_gradient(name):
    norm = functools.partial(DIFFERENTIABLE[name], eps=1e-6)
    zeros = jnp.zeros((1, D))
    slope = quick.jit(jax.jacrev(norm))(zeros)
    assert not NORMS[name][0](zeros, eps=1e-6).any() and np.isfinite(slope).all()


def test_multi_head_norm_is_a_layer_norm_of_each_head(rng, x64):
    h = rng.standard_normal((2, 5, 4, 6))
    scale, bias = rng.standard_normal(D), rng.standard_normal(D)
    expected = layer(h, 1e-5).reshape(2, 5, D)
    np.testing.assert_allclose(MULTI_HEAD_NORM(jnp.asarray(h), eps=1e-5), expected, rtol=1e-11)
    y = MULTI_HEAD_NORM(jnp.asarray(h), jnp.asarray(scale), jnp.asarray(bias), eps=1e-5)
    np.testing.assert_allclose(y, expected * scale + bias, rtol=1e-11, atol=1e-13)


def test_layer_norm_matches_the_golden_file():
    golden = golden_files.load("v1_components")
    norm = golden.under("layer_norm/")
    scale, bias = 1 + jnp.asarray(norm["param/weight"]), jnp.asarray(norm["param/bias"])
    y = LAYER_NORM(jnp.asarray(golden.arrays["input/x"]), scale, bias, eps=1e-5)
    golden_files.assert_matches(np.asarray(y), norm["output"], 2e-5, "y")


def test_multi_head_norm_matches_the_golden_file():
    norm = golden_files.load("v1_components").under("multi_head_norm/")
    h = jnp.swapaxes(jnp.asarray(norm["input"]), 1, 2)
    y = MULTI_HEAD_NORM(h, 1 + jnp.asarray(norm["param/weight"]), eps=1e-5)
    expected = np.swapaxes(norm["output"], 1, 2).reshape(y.shape)
    golden_files.assert_matches(np.asarray(y), expected, 2e-5, "y")


def test_soft_cap_is_the_identity_near_zero_and_bounded_by_the_cap():
    x = jnp.asarray([-1e6, -40.0, -1e-3, 0.0, 1e-3, 40.0, 1e6])
    y = quick.jit(lambda x: ops.soft_cap(x, 30.0))(x)
    np.testing.assert_allclose(y, 30 * np.tanh(np.asarray(x, np.float64) / 30), rtol=1e-6)
    assert np.abs(y).max() <= 30
    np.testing.assert_allclose(jax.grad(lambda x: ops.soft_cap(x, 30.0))(0.0), 1.0)


def test_soft_cap_none_is_the_identity():
    x = jnp.asarray([-1e6, 0.1, 3.0])
    np.testing.assert_array_equal(ops.soft_cap(x, None), x)
