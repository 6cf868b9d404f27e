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

from xlstm_jax.ops.parameters import cut_of, gathered_beside
from xlstm_jax.sharding.axes import dividing_axes, free_axes, mesh_axes_for

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
    free = devices_to_place()
    if not free:
        return fn(*args)
    placed = {letter: cut_by(letter, length) for letter, length in sizes.items()}
    # Named nowhere, an axis of one device would still be summed over in the gradient.
    placed["B"] += tuple(sorted(name for name, size in free.items() if size == 1))

    def spec(letters: str) -> P:
        return P(*(placed.get(letter) or None for letter in letters.split()))

    specs = jax.tree.map(spec, (axes, out_axes))
    return placed_by_device(fn, args, *specs)


def devices_to_place() -> dict[str, int]:
    """The axes of the active mesh and their sizes, without those that a `shard_map` of the caller
    has placed already; none if there is one device."""
    return free_axes() if jax.sharding.get_abstract_mesh().size > 1 else {}


def placed_by_device(fn: Callable[..., Any], args: Any, specs: Any, out_specs: Any) -> Any:
    """`fn(*args)` by each device for its part, cut as the specs say."""
    mesh = jax.sharding.get_abstract_mesh()
    mapped = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=specs,
        out_specs=out_specs,
        axis_names=set(devices_to_place()),
        check_vma=False,
    )
    if AxisType.Explicit in mesh.axis_types:
        args = jax.tree.map(jax.sharding.reshard, args, specs)
    return mapped(*args)


def cut_by(letter: str, length: int) -> tuple[str, ...]:
    """The axes of the active mesh that cut an axis of this length, longer than 1 themselves."""
    sizes = {name: size for name, size in devices_to_place().items() if size > 1}
    return dividing_axes(length, mesh_axes_for(LETTERS[letter]), sizes)


def summed_over_devices(
    fn: Callable[..., Any], x: jax.Array, kernel: jax.Array, *positions: jax.Array
) -> Any:
    """`fn(x, kernel, *positions)`, sums over positions, each device adding up its own.

    Where features are shared by devices too, these divide the positions among them: each then needs
    all of the kernel, but nobody waits for others in every chunk of a long loop.

    Args:
        fn: returns a tree of sums.
        x: `B T D`.
        kernel: `D vocab`, of the head. Where devices share it, it travels in x's dtype, once.
        positions: arrays `B T`.
    """
    free = devices_to_place()
    if not free:
        return fn(x, kernel, *positions)
    batch, time = cut_by("B", x.shape[0]), cut_by("T", x.shape[1])
    rest = {name: size for name, size in free.items() if name not in (*batch, *time)}
    time += dividing_axes(x.shape[1] // math.prod(free[axis] for axis in time), sorted(rest), rest)
    cut = cut_of(kernel.shape, ("embed", "vocab"))

    def add_up(x, part, *positions):
        operands: tuple[jax.Array, jax.Array] = gathered_beside(x, part, cut)
        sums = fn(*operands, *positions)
        return jax.tree.map(lambda a: jax.lax.psum(a, (*batch, *time)), sums)

    row = P(batch or None, time or None)
    specs = (P(*row, None), cut, *(row for _ in positions))
    return placed_by_device(add_up, (x, kernel, *positions), specs, P())
