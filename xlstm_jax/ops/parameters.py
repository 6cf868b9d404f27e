"""Parameters that devices share: gathered where they are used, their gradients scattered again.

XLA does the same for products with a parameter that is cut. Here are the ones it would add up whole
in every device before each takes its part: the table of token vectors and the head.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from xlstm_jax.sharding.axes import cutting, dividing


def cut_of(shape: Sequence[int], names: Sequence[str]) -> P:
    """How the rules in use cut a parameter whose axes have these names over the active mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    sizes = {name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual}
    sizes = {name: size for name, size in sizes.items() if size > 1}
    used: set[str] = set()
    cuts = []
    for length, name in zip(shape, names, strict=True):
        chosen = dividing(length, [axis for axis in cutting(name) if axis not in used], sizes)
        used.update(chosen)
        cuts.append(chosen or None)
    return P(*cuts)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(part: jax.Array, cut: P, dtype: Any) -> jax.Array:
    """All of a parameter, after it has travelled in `dtype`; in the dtype it had.

    Its gradient is added up over devices in the dtype it has: that of the parameter, whatever the
    one of activations is.
    """
    return gather(part.astype(dtype), cut).astype(part.dtype)


def _forward(part, cut, dtype):
    return gathered(part, cut, dtype), None


def _backward(cut, dtype, _, whole):
    return (add_up_cut(whole, cut),)


gathered.defvjp(_forward, _backward)
