"""Parameters that devices share: gathered where they are used, their gradients scattered again.

XLA does the same for products with a parameter that is cut. Here are the ones it would add up whole
in every device before each takes its part: the table of token vectors and the head.
"""

import functools
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec as P

from xlstm_jax.sharding.axes import free_axes, mesh_axes_for, partition_spec_for


def cut_of(shape: Sequence[int], names: Sequence[str]) -> P:
    """How the rules in use cut a parameter whose axes have these names over the active mesh."""
    return partition_spec_for(shape, [mesh_axes_for(name) for name in names], free_axes())


def gather(part: jax.Array, cut: P) -> jax.Array:
    """All of an array of which each device holds its cut; within a `shard_map`."""
    for number, axes in enumerate(cut):
        if axes is not None:
            part = jax.lax.all_gather(part, axes, axis=number, tiled=True)
    return part


def add_up_cut(whole: jax.Array, cut: P) -> jax.Array:
    """The sum over devices of an array that each has all of, along the axes of the cut; each gets
    its part of it. Within a `shard_map`."""
    for number, axes in enumerate(cut):
        if axes is not None:
            whole = jax.lax.psum_scatter(whole, axes, scatter_dimension=number, tiled=True)
    return whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gathered_beside(x: jax.Array, part: jax.Array, cut: P) -> tuple[jax.Array, jax.Array]:
    """x, and all of a parameter after it has travelled in x's dtype, in the dtype it had.

    Its gradient is added up over devices in the dtype it has: that of the parameter, whatever the
    one of activations is. That of x is handed on no sooner. A compiler may put the sum off
    otherwise, for as long as all layers take, and hold the whole of the gradient meanwhile.
    """
    return x, gather(part.astype(x.dtype), cut).astype(part.dtype)


def _forward(x, part, cut):
    return gathered_beside(x, part, cut), None


def _backward(cut, _, gradients):
    dx, whole = gradients
    return jax.lax.optimization_barrier((dx, add_up_cut(whole, cut)))


gathered_beside.defvjp(_forward, _backward)
