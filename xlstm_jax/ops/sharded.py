"""Ops on a mesh: each device computes its own rows and heads, and where it can its span of time.

A kernel is opaque to XLA's partitioner, which would gather its operands everywhere, and of other
forms it sees too little: chunks of all rows and heads on one axis cannot be cut any more. Nothing
of a recurrence crosses a row or a head, so `shard_map` over these needs no communication.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from xlstm_jax.sharding.axes import cutting, dividing

LETTERS = {"B": "batch", "T": "time", "H": "heads", "F": "inner"}
"""Axes that may be cut -> what they are for the rules."""


def per_device(
    fn: Callable[..., Any],
    args: Any,
    axes: Any,
    out_axes: Any,
    sizes: Mapping[str, int],
) -> Any:
    """`fn(*args)`, cut over the active mesh (`jax.set_mesh`) as the rules in use say.

    Args:
        fn: computes every row, every head and, where it is cut, every span of time on its own.
        args: a tuple of pytrees of arrays; None stays None.
        axes: for each argument, its axes as letters, of which those of `LETTERS` may be cut. A tree
            of such strings for a tree of arrays.
        out_axes: the same for what `fn` returns.
        sizes: the lengths of the axes to cut; one that is left out is not cut. Axes of the mesh
            that do not divide a length are not used: their devices compute the same.

    Within a `shard_map` of the caller's own, all of whose axes are placed, `fn` is called as it is;
    that one needs check_vma=False, as kernels do not say how their results vary over the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # Within a `shard_map` of the caller some axes, or all, are placed already.
    free = {name for name, kind in kinds.items() if kind != AxisType.Manual}
    if not free or mesh.size == 1:
        return fn(*args)
    placed = {letter: cut_by(letter, length) for letter, length in sizes.items()}
    # Named nowhere, an axis of one device would still be summed over in the gradient.
    placed["B"] += tuple(sorted(name for name in free if mesh.shape[name] == 1))

    def spec(letters: str) -> P:
        return P(*(placed.get(letter) or None for letter in letters.split()))

    specs = jax.tree.map(spec, (axes, out_axes))
    mapped = jax.shard_map(
        fn, mesh=mesh, in_specs=specs[0], out_specs=specs[1], axis_names=free, check_vma=False
    )
    if AxisType.Explicit in kinds.values():
        args = jax.tree.map(jax.sharding.reshard, args, specs[0])
    return mapped(*args)


def cut_by(letter: str, length: int) -> tuple[str, ...]:
    """The axes of the active mesh that cut an axis of this length, longer than 1 themselves."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    sizes = {name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual}
    sizes = {name: size for name, size in sizes.items() if size > 1}
    return dividing(length, cutting(LETTERS[letter]), sizes)


def summed_over_devices(
    fn: Callable[..., Any], x: jax.Array, weights: jax.Array, *positions: jax.Array
) -> Any:
    """`fn(x, weights, *positions)`, sums over positions, each device adding up its own.

    Where features are shared by devices too, these divide the positions among them: each then needs
    all of the weights, but nobody waits for others in every chunk of a long loop.

    Args:
        fn: returns a tree of sums.
        x: `B T D`.
        weights: what every device needs all of.
        positions: arrays `B T`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {name for name, kind in kinds if kind != AxisType.Manual}
    if not free or mesh.size == 1:
        return fn(x, weights, *positions)
    batch, time = cut_by("B", x.shape[0]), cut_by("T", x.shape[1])
    rest = {name: mesh.shape[name] for name in free if name not in (*batch, *time)}
    time += dividing(x.shape[1] // _product(mesh, time), sorted(rest), rest)

    def add_up(*args):
        return jax.tree.map(lambda a: jax.lax.psum(a, (*batch, *time)), fn(*args))

    row = P(batch or None, time or None)
    specs = (P(*row, None), P(), *(row for _ in positions))
    mapped = jax.shard_map(
        add_up, mesh=mesh, in_specs=specs, out_specs=P(), axis_names=free, check_vma=False
    )
    args = (x, weights, *positions)
    if AxisType.Explicit in mesh.axis_types:
        args = tuple(map(jax.sharding.reshard, args, specs))
    return mapped(*args)


def _product(mesh: Any, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
