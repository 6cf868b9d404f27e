"""Sizes at which the compiler selects matmul kernels that smaller tests do not reach.

At these sizes XLA for CPUs passes groups of operations to a library, which it does not do for small
arrays. This library once returned garbage for a matrix memory of zeros that was never materialized.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from xlstm_jax import ops
from xlstm_jax.modules import LM, LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig

SIZES = {  # B T H K V; one chunk, except "two chunks"
    "one head": (64, 64, 1, 64, 64),
    "short": (16, 40, 4, 32, 64),
    "wide": (8, 63, 4, 64, 128),
    "two chunks": (8, 128, 4, 64, 64),
}


def _inputs(size, rng):
    B, T, H, K, V = SIZES[size]
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H)]
    q, k, v, i, f = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    return q, k, v, i, f + 3


def _assert_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("implementation", ["chunkwise", "parallel"])
def test_mlstm_from_the_initial_state_equals_the_recurrence(implementation, size, rng):
    def outputs(name):
        return jax.jit(lambda *x: ops.mlstm(*x, implementation=name)[0])

    inputs = _inputs(size, rng)
    _assert_close(outputs(implementation)(*inputs), outputs("recurrent")(*inputs), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("implementation", ["chunkwise", "parallel"])
@pytest.mark.parametrize("with_state", [False, True], ids=["outputs", "outputs and state"])
def test_gradients_of_mlstm_equal_those_of_the_recurrence(with_state, implementation, size, rng):
    def grads(name):
        def loss(*x):
            outputs = ops.mlstm(*x, implementation=name)
            outputs = outputs if with_state else outputs[:1]
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs))

        return jax.jit(jax.grad(loss, range(5)))

    inputs = _inputs(size, rng)
    _assert_close(grads(implementation)(*inputs), grads("recurrent")(*inputs), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["chunkwise", "parallel"])
def test_gradients_of_the_final_state_alone_equal_those_of_the_recurrence(implementation, rng):
    """The cotangents of the outputs are zeros that are never materialized."""

    def grads(name):
        def loss(*x):
            options = dict(implementation=name, input_gate="sigmoid", normalize=False)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in ops.mlstm(*x, **options)[1])

        return jax.jit(jax.grad(loss, (1, 2, 3, 4)))

    inputs = _inputs("one head", rng)
    _assert_close(grads(implementation)(*inputs), grads("recurrent")(*inputs), 1e-3)


@pytest.mark.parametrize("op", [ops.slstm, ops.lstm])
def test_one_step_from_the_initial_state_equals_the_first_of_two(op, rng):
    x = jnp.asarray(rng.standard_normal((64, 2, 4, 4, 64)), jnp.float32)
    r = jnp.asarray(rng.standard_normal((4, 64, 4, 64)) / 8, jnp.float32)
    run = jax.jit(lambda x, r: op(x, r)[0])
    np.testing.assert_allclose(run(x[:, :1], r), run(x, r)[:, :1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "pattern, dim, T, remat",
    [
        pytest.param("msM", 128, 48, "none", marks=pytest.mark.slow),
        pytest.param("ms", 128, 1, "none", marks=pytest.mark.slow),
        pytest.param("mm", 32, 39, "full", marks=pytest.mark.slow),
        pytest.param("msmmM", 64, 128, "full", marks=pytest.mark.slow),
    ],
)
def test_sequences_of_a_large_batch_equal_those_of_small_batches(pattern, dim, T, remat, rng):
    heads = 1 if dim == 32 else 4
    cfg = LMConfig(
        vocab_size=256,
        dim=dim,
        pattern=pattern,
        mlstm=MLSTMConfig(num_heads=heads),
        slstm=SLSTMConfig(num_heads=heads),
        large=LargeConfig(num_heads=heads),
        remat=remat,
    )
    model, tokens = LM(cfg), jnp.asarray(rng.integers(0, 256, (64, T)))
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :1])

    def run(params, tokens):
        loss = lambda params: jnp.sum(jnp.sin(model.apply(params, tokens)[0]))  # noqa: E731
        return model.apply(params, tokens)[0], jax.grad(loss)(params)

    logits = jax.jit(lambda params, tokens: model.apply(params, tokens)[0])(params, tokens)
    small = quick.jit(run)  # the reference needs little optimization
    parts = [small(params, part) for part in jnp.split(tokens, 32)]
    _assert_close(logits, jnp.concatenate([part[0] for part in parts]), 1e-4)
    expected = jax.tree.map(lambda *leaves: sum(leaves), *(part[1] for part in parts))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    pairs = zip(*map(jax.tree.leaves, (jax.jit(run)(params, tokens)[1], expected)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * largest)
