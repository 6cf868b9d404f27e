"""Kernels on a mesh: each device computes its own part of the batch and of the heads.

A kernel is opaque to XLA's partitioner, which would gather its operands everywhere. Nothing of a
recurrence crosses a sequence or a head, so `shard_map` needs no communication.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"


def per_device(
    fn: Callable[..., Any], args: Any, axes: Any, out_axes: Any, *, batch: int, heads: int
) -> Any:
    """`fn(*args)`, cut over the active mesh (`jax.set_mesh`) by batch and by heads.

    Args:
        fn: computes every sequence and every head on its own.
        args: a tuple of pytrees of arrays; None stays None.
        axes: for each argument, its axes as letters: "B" the batch, "H" the heads. A tree of such
            strings for a tree of arrays.
        out_axes: the same for what `fn` returns.
        batch, heads: sizes of these axes. A mesh axis that does not divide them is not used:
            its devices then compute the same.
    """
    batch_axes, head_axes = _usable(batch, BATCH_AXES), _usable(heads, (HEAD_AXIS,))
    if not batch_axes and not head_axes:
        return fn(*args)

    def spec(letters: str) -> P:
        placed = {"B": batch_axes or None, "H": head_axes or None}
        return P(*(placed.get(letter) for letter in letters.split()))

    specs = jax.tree.map(spec, (axes, out_axes))
    mesh = jax.sharding.get_abstract_mesh()
    names = set(batch_axes + head_axes)
    mapped = jax.shard_map(
        fn, mesh=mesh, in_specs=specs[0], out_specs=specs[1], axis_names=names, check_vma=False
    )
    return mapped(*args)


def _usable(size: int, names: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of the active mesh among `names` that XLA still places, if they divide `size`."""
    mesh = jax.sharding.get_abstract_mesh()
    free = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    found = tuple(n for n in names if free.get(n) == AxisType.Auto and mesh.shape[n] > 1)
    return found if size % math.prod(mesh.shape[n] for n in found) == 0 else ()
