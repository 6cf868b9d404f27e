"""Gated activations: values and derivatives are those of JAX, and only arguments are saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.ops import activations

CASES = {
    "silu": (activations.silu, jax.nn.silu),
    "silu_gate": (activations.silu_gate, lambda gate, x: jax.nn.silu(gate) * x),
    "sigmoid_gate": (activations.sigmoid_gate, lambda gate, x: jax.nn.sigmoid(gate) * x),
}
every_function = pytest.mark.parametrize("name", CASES)


def arguments(name, dtype):
    gate = jnp.concatenate([jnp.linspace(-30, 30, 61), jnp.array([-1e4, 1e4])]).astype(dtype)
    return (gate,) if name == "silu" else (gate, jnp.linspace(-2, 2, gate.size).astype(dtype))


@every_function
def test_values_and_derivatives_are_those_of_jax(name):
    ours, expected = CASES[name]
    with jax.enable_x64(True):
        args = arguments(name, jnp.float64)
        tangents = jax.tree.map(jnp.cos, args)

        def derivatives(fn):
            loss = lambda *args: jnp.sum(jnp.sin(fn(*args)))  # noqa: E731
            grad = jax.grad(loss, tuple(range(len(args))))
            return fn(*args), jax.jvp(fn, args, tangents)[1], jax.jvp(grad, args, tangents)

        for a, b in zip(*map(jax.tree.leaves, map(derivatives, (ours, expected))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@every_function
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_closed_gates_keep_their_digits(name, dtype):
    ours, expected = CASES[name]
    args = arguments(name, dtype)

    def gradients(fn, *args):
        out, pullback = jax.vjp(fn, *args)
        return pullback(jnp.ones_like(out))

    actual = gradients(ours, *args)
    exact = gradients(expected, *(arg.astype(jnp.float32) for arg in args))
    for a, b, arg in zip(actual, exact, args, strict=True):
        assert a.dtype == arg.dtype
        rtol = 3e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=rtol, atol=1e-30)


@every_function
def test_only_arguments_are_saved_for_the_backward_pass(name):
    args = arguments(name, jnp.float32)
    pullback = jax.eval_shape(lambda *args: jax.vjp(CASES[name][0], *args)[1], *args)
    assert sum(leaf.size for leaf in jax.tree.leaves(pullback)) <= sum(a.size for a in args)
