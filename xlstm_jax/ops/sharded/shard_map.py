"""Ops on a mesh: each device computes its shard of the batch, of the heads and, if possible, time.

A kernel is opaque to XLA's partitioner, which would all-gather its operands. Other implementations
merge chunks, sequences and heads into one axis, which XLA cannot shard. A recurrence mixes neither
sequences nor heads, so a `shard_map` over these axes needs no communication.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from xlstm_jax.sharding.axes import dividing_axes, free_axes, mesh_axes_for
from xlstm_jax.typing import Size

LETTERS = {"B": "batch", "T": "time", "H": "heads", "F": "inner"}
"""Axis letters that may be sharded -> logical axes."""


def map_shards(
    fn: Callable[..., Any], args: Any, axes: Any, out_axes: Any, sizes: Mapping[str, Size]
) -> Any:
    """`fn(*args)`, sharded over the active mesh (`jax.set_mesh`) by the rules in use.

    Args:
        fn: computes sequences, heads and, if time is sharded, shards of time independently.
        args: a tuple of pytrees of arrays; None stays None.
        axes: for each argument, its axes as letters, of which those of `LETTERS` may be sharded. A
            tree of such strings for a tree of arrays; ignored if the argument is None.
        out_axes: the same for the results of `fn`.
        sizes: the lengths of the axes to shard; an axis that is left out is replicated. Mesh axes
            that do not divide a length are not used: their devices repeat the computation.

    Within a caller's `shard_map` over all axes, `fn` is called directly; that `shard_map` needs
    check_vma=False, as kernels do not declare how their results vary over the mesh.
    """
    auto = auto_mesh_axes()
    if not auto:
        return fn(*args)
    used = {letter: sharding_axes(letter, length) for letter, length in sizes.items()}
    # Gradients are summed over mesh axes that no spec names; naming those of size 1 avoids that.
    used["B"] += tuple(sorted(name for name, size in auto.items() if size == 1))

    def spec(letters: str) -> P:
        return P(*(used.get(letter) or None for letter in letters.split()))

    def spec_of(arg: Any, letters: Any) -> P | None:
        return None if arg is None else spec(letters)

    specs = jax.tree.map(spec_of, args, axes, is_leaf=lambda arg: arg is None)
    return shard_mapped(fn, args, specs, jax.tree.map(spec, out_axes))


def auto_mesh_axes() -> dict[str, int]:
    """Sizes of the mesh axes that are not in a caller's `shard_map`; empty on a single device."""
    return free_axes() if jax.sharding.get_abstract_mesh().size > 1 else {}


def shard_mapped(fn: Callable[..., Any], args: Any, specs: Any, out_specs: Any) -> Any:
    """`fn(*args)` on every device's shard, with these partition specs."""
    mesh = jax.sharding.get_abstract_mesh()
    mapped = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=specs,
        out_specs=out_specs,
        axis_names=set(auto_mesh_axes()),  # those of a caller's `shard_map` are manual already
        check_vma=False,  # kernels do not declare how their results vary
    )
    if AxisType.Explicit in mesh.axis_types:
        # With explicit axes `shard_map` does not reshard its arguments.
        args = jax.tree.map(jax.sharding.reshard, args, specs)
    return mapped(*args)


def sharding_axes(letter: str, length: Size) -> tuple[str, ...]:
    """The mesh axes with more than one device that shard an array axis of this length."""
    sizes = {name: size for name, size in auto_mesh_axes().items() if size > 1}
    return dividing_axes(length, mesh_axes_for(LETTERS[letter]), sizes)
