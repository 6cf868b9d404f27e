"""Kernels on a mesh: each device computes its own part of the batch and of the heads.

A kernel is opaque to XLA's partitioner, which would gather its operands everywhere. Nothing of a
recurrence crosses a sequence or a head, so `shard_map` needs no communication.
"""

import math
from collections.abc import Callable, Mapping
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
        batch, heads: sizes of these axes. The batch is cut along data and fsdp, heads along
            tensor; axes of other names, and those that do not divide, are not used: their devices
            compute the same.

    Within a `shard_map` of the caller's own, all of whose axes are placed, `fn` is called as it is;
    that one needs check_vma=False, as kernels do not say how their results vary over the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # Within a `shard_map` of the caller some axes, or all, are placed already.
    free = {name for name, kind in kinds.items() if kind != AxisType.Manual}
    if not free:
        return fn(*args)
    batch_axes = _dividing(batch, [name for name in BATCH_AXES if name in free], mesh.shape)
    head_axes = _dividing(heads, [name for name in (HEAD_AXIS,) if name in free], mesh.shape)

    def spec(letters: str) -> P:
        placed = {"B": batch_axes or None, "H": head_axes or None}
        return P(*(placed.get(letter) for letter in letters.split()))

    specs = jax.tree.map(spec, (axes, out_axes))
    mapped = jax.shard_map(
        fn, mesh=mesh, in_specs=specs[0], out_specs=specs[1], axis_names=free, check_vma=False
    )
    if AxisType.Explicit in kinds.values():
        args = jax.tree.map(jax.sharding.reshard, args, specs[0])
    return mapped(*args)


def _dividing(size: int, names: list[str], lengths: Mapping[str, int]) -> tuple[str, ...]:
    """As many of these axes of a mesh as together divide `size`."""
    chosen: list[str] = []
    for name in names:
        if size % math.prod(lengths[n] for n in (*chosen, name)) == 0:
            chosen.append(name)
    return tuple(chosen)
