"""Ops on a mesh: each device computes its shard of the batch and the heads, if it can of time.

A kernel is opaque to XLA's partitioner, which would all-gather its operands, and of other forms it
sees too little: chunks of all sequences and heads on one axis cannot be sharded any more. A
recurrence mixes neither sequences nor heads, so a `shard_map` over these needs no communication.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from xlstm_jax.sharding.axes import dividing_axes, free_axes, mesh_axes_for

LETTERS = {"B": "batch", "T": "time", "H": "heads", "F": "inner"}
"""Axes that may be sharded -> their logical axes."""


def map_shards(
    fn: Callable[..., Any],
    args: Any,
    axes: Any,
    out_axes: Any,
    sizes: Mapping[str, int],
) -> Any:
    """`fn(*args)`, sharded over the active mesh (`jax.set_mesh`) by the rules in use.

    Args:
        fn: computes every sequence, every head and, where it is sharded, every shard of time apart.
        args: a tuple of pytrees of arrays; None stays None.
        axes: for each argument, its axes as letters, of which those of `LETTERS` may be sharded. A
            tree of such strings for a tree of arrays; not read where the argument is None.
        out_axes: the same for what `fn` returns.
        sizes: the lengths of the axes to shard; one that is left out is replicated. Mesh axes that
            do not divide a length are not used: their devices compute the same.

    Within a `shard_map` of the caller's own over all axes, `fn` is called as it is; that one needs
    check_vma=False, as kernels do not declare how their results vary over the mesh.
    """
    auto = auto_mesh_axes()
    if not auto:
        return fn(*args)
    used = {letter: sharding_axes(letter, length) for letter, length in sizes.items()}
    # Named nowhere, a mesh axis of one device would still be summed over in the gradient.
    used["B"] += tuple(sorted(name for name, size in auto.items() if size == 1))

    def spec(letters: str) -> P:
        return P(*(used.get(letter) or None for letter in letters.split()))

    def spec_of(arg: Any, letters: Any) -> P | None:
        return None if arg is None else spec(letters)

    specs = jax.tree.map(spec_of, args, axes, is_leaf=lambda arg: arg is None)
    return shard_mapped(fn, args, specs, jax.tree.map(spec, out_axes))


def auto_mesh_axes() -> dict[str, int]:
    """The axes of the active mesh and their sizes, without those of the caller's `shard_map`; none
    if there is one device."""
    return free_axes() if jax.sharding.get_abstract_mesh().size > 1 else {}


def shard_mapped(fn: Callable[..., Any], args: Any, specs: Any, out_specs: Any) -> Any:
    """`fn(*args)` by each device for its shard, by these partition specs."""
    mesh = jax.sharding.get_abstract_mesh()
    mapped = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=specs,
        out_specs=out_specs,
        axis_names=set(auto_mesh_axes()),
        check_vma=False,
    )
    if AxisType.Explicit in mesh.axis_types:
        args = jax.tree.map(jax.sharding.reshard, args, specs)
    return mapped(*args)


def sharding_axes(letter: str, length: int) -> tuple[str, ...]:
    """The axes of the active mesh, longer than 1, that shard an axis of this length."""
    sizes = {name: size for name, size in auto_mesh_axes().items() if size > 1}
    return dividing_axes(length, mesh_axes_for(LETTERS[letter]), sizes)
