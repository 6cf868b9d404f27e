"""Sharded parameters: all-gathered before use, with reduce-scattered gradients.

XLA does the same for products with a sharded parameter. This module is for parameters whose
gradient XLA would all-reduce before each device takes its shard: the token embedding and the head.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from xlstm_jax.ops.sharded.shard_map import auto_mesh_axes, shard_mapped, sharding_axes
from xlstm_jax.sharding.axes import dividing_axes, free_axes, mesh_axes_for, partition_spec_for
from xlstm_jax.typing import Array, Float, Int


def partition_spec(shape: Sequence[int], names: Sequence[str]) -> P:
    """Partition spec of a parameter with these logical axes, by the rules and mesh in use."""
    return partition_spec_for(shape, [mesh_axes_for(name) for name in names], free_axes())


def all_gather(shard: jax.Array, spec: P, *, reverse: bool = False) -> jax.Array:
    """The global array of which each device has a shard; call within a `shard_map`.

    The transpose is a reduce-scatter in the dtype of `shard`, in the opposite order of dimensions:
    `reverse` gathers the last one first. `shard_map` itself sums over axes that `spec` omits.
    """
    dimensions = list(enumerate(spec))
    for dimension, axes in reversed(dimensions) if reverse else dimensions:
        if axes is not None:
            shard = jax.lax.all_gather(shard, axes, axis=dimension, tiled=True)
    return shard


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def all_gather_with(x: jax.Array, shard: jax.Array, spec: P) -> tuple[jax.Array, jax.Array]:
    """x and the global parameter, which is all-gathered in x's dtype and cast back to its own.

    The gradient of the parameter is reduce-scattered in the dtype of the parameter, whatever the
    dtype of activations is.
    """
    return x, all_gather(shard.astype(x.dtype), spec).astype(shard.dtype)


@all_gather_with.defjvp
def _gather_tangents(spec, primals, tangents):
    # Transposed, dx waits for the reduce-scatter. Otherwise the compiler may delay it until the
    # backward pass of all layers is done, with the global gradient in memory in the meantime.
    dx, dshard = jax.lax.optimization_barrier(tangents)
    # Not cast to x's dtype: the transpose of this all-gather is the reduce-scatter.
    return all_gather_with(*primals, spec), (dx, all_gather(dshard, spec, reverse=True))


def sum_over_devices(
    fn: Callable[..., Any], x: jax.Array, kernel: jax.Array, *positions: jax.Array
) -> Any:
    """`fn(x, kernel, *positions)`, a tree of sums over positions, sharded over all devices.

    The mesh axes that shard features shard the positions instead: every device then needs the
    global kernel, but there is no communication in each chunk of a long loop.

    Args:
        x: `B T D`.
        kernel: `D vocab`, of the head. If it is sharded, it is all-gathered once, in x's dtype.
        positions: arrays `B T`.
    """
    auto = auto_mesh_axes()
    if not auto:
        return fn(x, kernel, *positions)
    batch, time = sharding_axes("B", x.shape[0]), sharding_axes("T", x.shape[1])
    rest = {name: size for name, size in auto.items() if name not in (*batch, *time)}
    # The remaining axes divide each device's shard of time, if they divide its length.
    time += dividing_axes(x.shape[1] // math.prod(auto[axis] for axis in time), sorted(rest), rest)
    spec = partition_spec(kernel.shape, ("embed", "vocab"))

    def local_sums(x, shard, *positions):
        operands: tuple[jax.Array, jax.Array] = all_gather_with(x, shard, spec)
        sums = fn(*operands, *positions)
        return jax.tree.map(lambda a: jax.lax.psum(a, (*batch, *time)), sums)

    by_position = P(batch or None, time or None)
    specs = (P(*by_position, None), spec, *(by_position for _ in positions))
    return shard_mapped(local_sums, (x, kernel, *positions), specs, P())


def embed(
    tokens: Int[Array, "B T"], table: Float[Array, "vocab D"], dtype: jnp.dtype
) -> Float[Array, "B T D"]:
    """`ops.embed` with a sharded table, all-gathered in `dtype`."""
    positions = P(*(sharding_axes(a, n) or None for a, n in zip("BT", tokens.shape, strict=True)))
    spec = partition_spec(table.shape, ("vocab", "embed"))

    @jax.custom_jvp
    def look_up(shard, tokens):
        return jnp.take(all_gather(shard.astype(dtype), spec), tokens, axis=0)

    @look_up.defjvp
    def tangent(primals, tangents):
        # Cast after the look-up, so that its transpose casts before the sum: many tokens, on many
        # devices, add to the same embedding.
        embeddings = jnp.take(all_gather(tangents[0], spec, reverse=True), primals[1], axis=0)
        return look_up(*primals), embeddings.astype(dtype)

    return shard_mapped(look_up, (table, tokens), (spec, positions), P(*positions, None))
