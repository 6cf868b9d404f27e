"""The table of token vectors and the head on a mesh that shards both."""

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
VOCAB = {"rows": 24, "width": 22, "neither": 23}
"""By what of a table 8 devices can divide; "neither" is as wide as 15."""
MESHES = {
    "fsdp": dict(fsdp=8),
    "data, fsdp, tensor": dict(data=2, fsdp=2, tensor=2),
    "fsdp, seq": dict(fsdp=4, seq=2),
}
EXPLICIT = (jax.sharding.AxisType.Explicit,) * 2


def embedded(tokens, weights, table, *, dtype):
    """Token vectors, and the gradient of their sum with these weights to the table."""

    def loss(table):
        x = ops.embed(tokens, table, dtype=dtype)
        return jnp.sum(x.astype(jnp.float32) * weights), x

    gradient, x = jax.grad(loss, has_aux=True)(table)
    return x, gradient


def scored(tokens, x, kernel, *, dtype):
    """Sums of the cross entropy, and their gradients to the head and to what it reads."""
    weights = (tokens % 3).astype(jnp.float32)

    def loss(x, kernel):
        sums = ops.cross_entropy(x.astype(dtype), kernel, tokens, weights, chunk_size=5)
        return sums.ce_sum, sums

    (dx, dkernel), sums = jax.grad(loss, (0, 1), has_aux=True)(x, kernel)
    return sums, dx, dkernel


def example(vocab: int, width: int):
    """Token ids, features of each position, and a table."""
    rng = np.random.default_rng(vocab)
    tokens = jnp.asarray(rng.integers(0, vocab, (B, T)), jnp.int32)
    x, table = (rng.standard_normal(shape) for shape in ((B, T, width), (vocab, width)))
    return tokens, jnp.asarray(x, jnp.float32), jnp.asarray(table, jnp.float32)


def on_devices(compute, args, mesh):
    with jax.set_mesh(make_mesh(**mesh)):
        return quick.jit(compute)(*args)


def assert_all_close(actual, expected, tolerance):
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, leaf), found in zip(leaves, jax.tree.leaves(actual), strict=True):
        assert found.dtype == leaf.dtype
        pair = (np.asarray(a, np.float64) for a in (found, leaf))
        assert_close(*pair, tolerance, jax.tree_util.keystr(path))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("cut", VOCAB)
def test_a_mesh_changes_no_vector_no_sum_and_no_gradient(cut, mesh):
    for compute in (embedded, scored):
        args, expected = alone(compute, cut)
        compute = functools.partial(compute, dtype=jnp.dtype("float32"))
        assert_all_close(on_devices(compute, args, mesh), expected, 1e-6)


@functools.cache
def alone(compute, cut):
    """Arguments, and what one device makes of them."""
    tokens, x, table = example(VOCAB[cut], 15 if cut == "neither" else D)
    args = tokens, x, table if compute is embedded else table.T
    return args, quick.jit(functools.partial(compute, dtype=jnp.dtype("float32")))(*args)


@pytest.mark.parametrize("compute", [embedded, scored])
def test_gradients_of_eight_devices_are_summed_in_the_dtype_of_the_table(compute):
    """Vectors and logits are those of bfloat16 on one device; of a sum over eight in bfloat16 a
    two-hundredth would be lost."""
    tokens, x, table = example(VOCAB["rows"], D)
    tokens = tokens % 3  # many devices add to the same row
    last = table if compute is embedded else table.T
    compute = functools.partial(compute, dtype=jnp.dtype("bfloat16"))
    expected = quick.jit(compute)(tokens, x, last)
    found = on_devices(compute, (tokens, x, last), MESHES["fsdp"])
    assert_all_close(found[-1:], expected[-1:], 1e-6)


def test_axes_of_explicit_meshes_share_them_as_well():
    tokens, _, table = example(VOCAB["rows"], D)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=EXPLICIT)):
        look_up = quick.jit(lambda tokens, table: ops.embed(tokens, table))
        assert "all-gather" in look_up.lower(tokens, table).compile().as_text()
        np.testing.assert_array_equal(look_up(tokens, table), table[tokens])


def test_within_the_callers_shard_map_the_table_is_replicated():
    tokens, x, table = example(VOCAB["rows"], D)
    mesh = make_mesh(data=8)
    P = jax.sharding.PartitionSpec

    def rows(tokens, table):
        return ops.embed(tokens, table)

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            rows, in_specs=(P(None, "data"), P()), out_specs=P(None, "data"), check_vma=False
        )
        np.testing.assert_array_equal(quick.jit(mapped)(tokens, table), table[tokens])
