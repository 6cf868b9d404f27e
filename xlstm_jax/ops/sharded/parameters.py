"""Parameters sharded over devices: all-gathered where they are used, their gradients scattered.

XLA does the same for products with a sharded parameter. Here are the ones whose gradient it would
all-reduce before each device takes its shard: the table of token vectors and the head.
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
    """How the rules in use shard a parameter with these logical axes over the active mesh."""
    return partition_spec_for(shape, [mesh_axes_for(name) for name in names], free_axes())


def all_gather(shard: jax.Array, spec: P) -> jax.Array:
    """The global array of which each device has a shard; within a `shard_map`."""
    for number, axes in enumerate(spec):
        if axes is not None:
            shard = jax.lax.all_gather(shard, axes, axis=number, tiled=True)
    return shard


def reduce_scatter_grad(gradient: jax.Array, spec: P) -> jax.Array:
    """A gradient summed over the axes of `spec`, to each device its shard; in a `shard_map`."""
    for number, axes in enumerate(spec):
        if axes is not None:
            gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=number, tiled=True)
    return gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def all_gather_with(x: jax.Array, shard: jax.Array, spec: P) -> tuple[jax.Array, jax.Array]:
    """x, and the global parameter, communicated in x's dtype, in the dtype it had.

    Its gradient is reduce-scattered in the dtype of the parameter, whatever that of activations is,
    and before the gradient of x is passed on: a compiler may otherwise delay the reduce-scatter for
    as long as all layers take, and keep the global gradient in memory meanwhile.
    """
    return x, all_gather(shard.astype(x.dtype), spec).astype(shard.dtype)


def _gather_backward(spec, _, gradients):
    dx, gradient = gradients
    return jax.lax.optimization_barrier((dx, reduce_scatter_grad(gradient, spec)))


all_gather_with.defvjp(lambda *inputs: (all_gather_with(*inputs), None), _gather_backward)


def sum_over_devices(
    fn: Callable[..., Any], x: jax.Array, kernel: jax.Array, *positions: jax.Array
) -> Any:
    """`fn(x, kernel, *positions)`, sums over positions, each device summing its own.

    Where features are sharded too, their devices divide the positions among them: each then needs
    the global kernel, but no device waits for others in every chunk of a long loop.

    Args:
        fn: returns a tree of sums.
        x: `B T D`.
        kernel: `D vocab`, of the head. Where it is sharded, it is all-gathered in x's dtype, once.
        positions: arrays `B T`.
    """
    auto = auto_mesh_axes()
    if not auto:
        return fn(x, kernel, *positions)
    batch, time = sharding_axes("B", x.shape[0]), sharding_axes("T", x.shape[1])
    rest = {name: size for name, size in auto.items() if name not in (*batch, *time)}
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
    """`ops.embed` with a sharded table, which is all-gathered in `dtype`."""
    positions = P(*(sharding_axes(a, n) or None for a, n in zip("BT", tokens.shape, strict=True)))
    spec = partition_spec(table.shape, ("vocab", "embed"))

    @jax.custom_vjp
    def look_up(tokens, shard):
        return jnp.take(all_gather(shard.astype(dtype), spec), tokens, axis=0)

    def backward(tokens, dx):
        rows = dx.astype(table.dtype).reshape(-1, dx.shape[-1])
        gradient = jnp.zeros(table.shape, table.dtype).at[tokens.reshape(-1)].add(rows)
        return None, reduce_scatter_grad(gradient, spec)

    look_up.defvjp(lambda tokens, shard: (look_up(tokens, shard), tokens), backward)
    return shard_mapped(look_up, (tokens, table), (positions, spec), P(*positions, None))
