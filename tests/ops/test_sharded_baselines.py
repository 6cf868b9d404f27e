"""Ops of the baselines on a mesh: values, states and gradients are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from tests.ops import runs
from tests.ops.subjects import BASELINES, OPTIONS, Subject, T, make_case, op_of, with_flags
from tests.ops.tolerances import TABLE
from xlstm_jax import ops
from xlstm_jax.sharding import make_mesh

MESHES = {
    "fsdp, tensor": dict(data=1, fsdp=2, seq=2, tensor=2),  # the sequence is all-gathered
    "indivisible": dict(data=4, tensor=2),
}
VARIANTS = [variant for variant in OPTIONS if op_of(variant) in BASELINES]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mesh_changes_neither_values_nor_gradients(variant, mesh):
    case = with_flags(make_case(variant, T), num_masked=3)
    cotangents = runs.random_cotangents(variant, case)
    expected = runs.run_reference(variant, case, cotangents)
    with jax.set_mesh(make_mesh(**mesh)):
        actual = runs.run(Subject(variant, "auto"), case, cotangents)
    runs.assert_results_close(actual, expected, TABLE["float32"])


@pytest.mark.parametrize(
    "groups,tensor", [(2, 2), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, 2), (2, 4)))]
)
def test_heads_that_share_keys_are_on_one_device(groups, tensor):
    """A single group is replicated; if devices do not divide the groups, they repeat the work."""
    rng = np.random.default_rng(groups)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, 5, heads, 4)), jnp.float32)
        for heads in (4, groups, groups)
    )

    @quick.jit
    def compute(*args):
        call = functools.partial(ops.attention, window=3, num_sinks=1)
        (y, state), pullback, length = jax.vjp(
            lambda *args: (lambda y, state: ((y, state[:2]), state.length))(*call(*args)),
            *args,
            has_aux=True,
        )
        return y, state, length, pullback(jax.tree.map(jnp.cos, (y, state)))

    expected = compute(q, k, v)
    with jax.set_mesh(make_mesh(data=8 // tensor, tensor=tensor)):
        actual = compute(q, k, v)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_program_calls_a_library_that_waits_for_threads(variant):
    """JAX's triangular solve would call BLAS. CPU devices that wait for each other in a collective
    may occupy all threads, so that a step on a mesh deadlocks."""
    case = with_flags(make_case(variant, T), num_masked=3)
    call = runs.program(Subject(variant, "auto"))

    def loss(inputs):
        h, _ = call(inputs, case.weights, jax.tree.map(jnp.asarray, case.state))
        return jnp.sum(jnp.sin(h))

    case = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case._replace(reset=None, mask=None))
    text = jax.jit(jax.grad(loss)).lower(case.inputs).as_text()
    assert "triangular" not in text and "custom_call" not in text


def test_chunks_of_equal_keys_equal_the_recurrence():
    """The system of a chunk is then the least well conditioned: each write replaces the last."""
    rng, (H, length) = np.random.default_rng(0), (2, 128)
    q, k = (jnp.asarray(rng.standard_normal((1, n, H, 8)), jnp.float32) for n in (length, 1))
    k = jnp.broadcast_to(ops.unit_norm(k), q.shape)
    gates = jnp.zeros((1, length, H)), jnp.ones((1, length, H))
    run = functools.partial(ops.gated_delta_rule, q, k, q, *gates)
    call = quick.jit(lambda: (run(chunk_size=64)[0], run(implementation="recurrent")[0]))
    h, expected = call()
    np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-5)
