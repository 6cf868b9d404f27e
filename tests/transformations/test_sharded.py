"""Derivatives of sharded parameters: the embedding and the head, all-gathered on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests import quick
from tests.transformations.cases import assert_close
from xlstm_jax import ops
from xlstm_jax.sharding import make_mesh

VOCAB, DIM, B, T = 8, 4, 8, 2


def loss(params, tokens):
    x = jnp.tanh(ops.embed(tokens, params["table"]))
    return ops.cross_entropy(x, params["head"], tokens, jnp.ones((B, T))).ce_sum


def derivatives(params, tangents, tokens):
    """Along `tangents`: the derivative of the loss, and forward over reverse, reverse over both."""
    fn = functools.partial(loss, tokens=tokens)
    slope = lambda params: jax.jvp(fn, (params,), (tangents,))[1]  # noqa: E731
    hvp = jax.jvp(jax.grad(fn), (params,), (tangents,))[1]
    return slope(params), hvp, jax.grad(slope)(params)


def test_derivatives_of_sharded_parameters_equal_those_on_one_device():
    rng = np.random.default_rng(0)
    shapes = {"table": (VOCAB, DIM), "head": (DIM, VOCAB)}
    normal = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params, tangents = ({name: normal(s) for name, s in shapes.items()} for _ in range(2))
    tokens = jnp.asarray(rng.integers(0, VOCAB, (B, T)), jnp.int32)
    expected = quick.jit(derivatives)(params, tangents, tokens)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        program = quick.jit(derivatives).lower(params, tangents, tokens).compile()
        actual = program(params, tangents, tokens)
    assert "reduce-scatter" in program.as_text()
    assert_close(actual, expected, 1e-5)
    assert_close(actual[1], actual[2], 1e-5)
