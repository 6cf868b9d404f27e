"""What each dimension of an array is, and how the rules in use shard it.

For parameters, tables map the end of a path to logical axes: one here for what all models share,
and one per block kind, which `modules` passes in. Moments and averages of parameters have the same
paths below a prefix, and match the same rows. Activations name their axes where they are computed:
`constrain`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from xlstm_jax.sharding.rules import rules_in_use

Axes = tuple[str | None, ...]

_AXES: tuple[tuple[str, Axes], ...] = (
    # Sharded along its width only where the vocabulary does not divide.
    (r"token_embedding/embedding", ("vocab", "embed")),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r"(\w*norm|norm_\w+)/(scale|scale_offset|bias)", (None,)),
    (r"(out_proj|proj_down)/bias", (None,)),
    (r"conv/kernel", (None, None)),
    (r"conv/kernel", (None, "embed", None)),  # channels mix
    (r"conv/bias", (None,)),
    (r"ffn/(proj_up|proj_up_gate)/kernel", ("embed", "mlp")),
    (r"ffn/(proj_up|proj_up_gate)/bias", ("mlp",)),
    (r"ffn/proj_down/kernel", ("mlp", "embed")),
)
"""The end of a path -> its axes; the first that fits counts. One axis more is `layers`, before."""

_block_axes: Callable[[str], Mapping[str, Axes]] = lambda letter: {}  # noqa: E731


def set_block_axes(axes_of: Callable[[str], Mapping[str, Axes]]) -> None:
    """Sets where the axes of block parameters, those below `stack/LETTER/`, are looked up.

    Args:
        axes_of: letter -> rows like those of the table here, which they precede.
    """
    global _block_axes
    _block_axes = axes_of


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in a tree as "stack/m/mlstm/proj_up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(path: str, ndim: int) -> Axes:
    """The names of a parameter's axes; None for one that is never sharded.

    Raises:
        KeyError: no row fits; a new parameter needs a row here or in the `axes` of its block kind.
    """
    if ndim == 0:  # a count of an optimizer
        return ()
    block = re.search(r"(?:^|/)stack/([^/]+)/", path)
    own = _block_axes(block[1]).items() if block else ()
    for pattern, names in (*own, *_AXES):
        if re.search(rf"(^|/){pattern}$", path) and ndim - len(names) in (0, 1):
            return ("layers",) * (ndim - len(names)) + names
    raise KeyError(f"{path} with {ndim} axes has no row in the table of logical axes.")


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, sharded by the rules in use over the axes of the active mesh (`jax.set_mesh`).

    Args:
        x: an activation.
        names: what each of its axes is, of `LOGICAL_AXES`; None for one that is never sharded.

    Without a mesh, and within a `shard_map` over all of it, x is returned as it is.
    """
    auto = _axes_of_mesh(AxisType.Auto)
    if all(size == 1 for size in auto.values()):
        return x
    spec = partition_spec_for(x.shape, map(mesh_axes_for, names), auto)
    return jax.lax.with_sharding_constraint(x, spec)


def is_sharded(name: str) -> bool:
    """Whether the active mesh has more than one device along this logical axis."""
    free = free_axes()
    return any(free.get(axis, 1) > 1 for axis in mesh_axes_for(name))


def mesh_axes_for(name: str | None) -> tuple[str, ...]:
    """The mesh axes that the rules in use give to a logical axis."""
    return rules_in_use()[name] if name else ()


def free_axes() -> dict[str, int]:
    """Axes of the active mesh and their sizes, without those of an enclosing `shard_map`."""
    return _axes_of_mesh(AxisType.Auto, AxisType.Explicit)


def _axes_of_mesh(*wanted: AxisType) -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind in wanted}


def partition_spec_for(
    shape: Sequence[int], axes: Iterable[Sequence[str]], sizes: Mapping[str, int]
) -> PartitionSpec:
    """How an array is sharded: each dimension over as many of its mesh axes as together divide it
    and shard none before it."""
    used: set[str] = set()
    spec = []
    for length, names in zip(shape, axes, strict=True):
        chosen = dividing_axes(length, [name for name in names if name not in used], sizes)
        used.update(chosen)
        spec.append(chosen[0] if len(chosen) == 1 else chosen or None)
    return PartitionSpec(*spec)


def dividing_axes(length: int, axes: Iterable[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """As many of these mesh axes, as far as the mesh has them, as together divide `length`."""
    chosen, parts = [], 1
    for axis in axes:
        if axis in sizes and length % (parts * sizes[axis]) == 0:
            chosen.append(axis)
            parts *= sizes[axis]
    return tuple(chosen)
