"""Token embedding and head on a mesh that shards both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from tests.ops.tolerances import assert_close
from xlstm_jax import ops
from xlstm_jax.sharding import make_mesh

B, T, D = 4, 8, 16
VOCAB = {"vocab": 24, "width": 22, "neither": 23}
"""Vocabulary size by the table axis that 8 devices divide; for "neither" the width is 15."""
MESHES = {
    "fsdp": dict(fsdp=8),
    "data, fsdp, tensor": dict(data=2, fsdp=2, tensor=2),
    "fsdp, seq": dict(fsdp=4, seq=2),
}
EXPLICIT = (jax.sharding.AxisType.Explicit,) * 2


def embedded(tokens, weights, table, *, dtype):
    """Token embeddings, and the gradient of their weighted sum by the table."""

    def loss(table):
        x = ops.embed(tokens, table, dtype=dtype)
        return jnp.sum(x.astype(jnp.float32) * weights), x

    gradient, x = jax.grad(loss, has_aux=True)(table)
    return x, gradient


def scored(tokens, x, kernel, *, dtype):
    """Sums of the cross entropy, and the gradients by the inputs and the kernel of the head."""
    weights = (tokens % 3).astype(jnp.float32)

    def loss(x, kernel):
        sums = ops.cross_entropy(x.astype(dtype), kernel, tokens, weights, chunk_size=5)
        return sums.ce_sum, sums

    (dx, dkernel), sums = jax.grad(loss, (0, 1), has_aux=True)(x, kernel)
    return sums, dx, dkernel


def example(vocab: int, width: int):
    """Token ids, features of every position, and a table."""
    rng = np.random.default_rng(vocab)
    tokens = jnp.asarray(rng.integers(0, vocab, (B, T)), jnp.int32)
    x, table = (rng.standard_normal(shape) for shape in ((B, T, width), (vocab, width)))
    return tokens, jnp.asarray(x, jnp.float32), jnp.asarray(table, jnp.float32)


def on_devices(compute, args, mesh):
    with jax.set_mesh(make_mesh(**mesh)):
        return quick.jit(compute)(*args)


def assert_all_close(actual, expected, tolerance):
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, leaf), value in zip(leaves, jax.tree.leaves(actual), strict=True):
        assert value.dtype == leaf.dtype
        pair = (np.asarray(a, np.float64) for a in (value, leaf))
        assert_close(*pair, tolerance, jax.tree_util.keystr(path))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("divisible", VOCAB)
def test_mesh_changes_neither_values_nor_gradients(divisible, mesh):
    for compute in (embedded, scored):
        args, expected = single_device(compute, divisible)
        compute = functools.partial(compute, dtype=jnp.dtype("float32"))
        assert_all_close(on_devices(compute, args, mesh), expected, 1e-6)


@functools.cache
def single_device(compute, divisible):
    """Arguments, and the results on a single device."""
    tokens, x, table = example(VOCAB[divisible], 15 if divisible == "neither" else D)
    args = tokens, x, table if compute is embedded else table.T
    return args, quick.jit(functools.partial(compute, dtype=jnp.dtype("float32")))(*args)


@pytest.mark.parametrize("compute", [embedded, scored])
def test_gradients_over_eight_devices_are_summed_in_the_dtype_of_the_table(compute):
    """Activations are bfloat16; sums over eight devices in bfloat16 would lose half a percent."""
    tokens, x, table = example(VOCAB["vocab"], D)
    tokens = tokens % 3  # many devices add to the same embedding
    last = table if compute is embedded else table.T
    compute = functools.partial(compute, dtype=jnp.dtype("bfloat16"))
    expected = quick.jit(compute)(tokens, x, last)
    actual = on_devices(compute, (tokens, x, last), MESHES["fsdp"])
    assert_all_close(actual[-1:], expected[-1:], 1e-6)


def test_table_is_sharded_over_explicit_mesh_axes():
    tokens, _, table = example(VOCAB["vocab"], D)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=EXPLICIT)):
        look_up = quick.jit(lambda tokens, table: ops.embed(tokens, table))
        assert "all-gather" in look_up.lower(tokens, table).compile().as_text()
        np.testing.assert_array_equal(look_up(tokens, table), table[tokens])


def test_table_is_replicated_within_a_callers_shard_map():
    tokens, x, table = example(VOCAB["vocab"], D)
    mesh = make_mesh(data=8)
    P = jax.sharding.PartitionSpec

    def embed(tokens, table):
        return ops.embed(tokens, table)

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            embed, in_specs=(P(None, "data"), P()), out_specs=P(None, "data"), check_vma=False
        )
        np.testing.assert_array_equal(quick.jit(mapped)(tokens, table), table[tokens])
