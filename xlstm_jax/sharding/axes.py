"""What each dimension of an array is, and where that cuts it.

For parameters one table, from a path to the names of its axes. They are plain arrays, so this table
is all there is. Moments and averages of parameters lie under the same paths with something before
them, and match the same rows. Activations name their axes where they are made: `constrain`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from xlstm_jax.sharding.rules import rules_in_use

LOGICAL_AXES = ("batch", "time", "embed", "inner", "mlp", "heads", "vocab", "layers")
"""embed: model width, where a parameter reads it; inner: heads x head size; mlp: feed-forward."""

_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Along its width only where the number of rows cannot be divided.
    (r"token_embedding/embedding", ("vocab", "embed")),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r"(\w*norm|norm_\w+)/(scale|scale_offset|bias)", (None,)),
    (r"m/mlstm/proj_up/kernel", ("embed", "inner")),
    (r"m/mlstm/proj_down/kernel", ("inner", "embed")),
    (r"m/mlstm/[qkv]_proj/kernel", ("inner", None, None)),  # small blocks on a diagonal
    (r"m/mlstm/(proj_up|[qkv]_proj)/bias", ("inner",)),
    (r"m/mlstm/learnable_skip", ("inner",)),
    # Its rows are those of q, k and v one after the other, which no cut respects; it is small.
    (r"m/mlstm/(input|forget)_gate/kernel", (None, "heads")),
    (r"M/mlstm/(input|forget)_gate/kernel", ("embed", "heads")),
    (r"mlstm/(input|forget)_gate/bias", (None,)),
    (r"M/mlstm/(q|k|v|output_gate)/kernel", ("embed", "inner")),
    (r"M/mlstm/(q|k|v|output_gate)/bias", ("inner",)),
    (r"M/mlstm/out_proj/kernel", ("inner", "embed")),
    (r"(out_proj|proj_down)/bias", (None,)),
    (r"s/slstm/(input_gate|forget_gate|cell_input|output_gate)/kernel", ("heads", "embed", None)),
    (r"s/slstm/recurrent_kernel", ("heads", "embed", None, None)),
    (r"s/slstm/bias", ("heads", None, None)),
    (r"conv/kernel", (None, None)),
    (r"conv/kernel", (None, "embed", None)),  # channels mix
    (r"conv/bias", (None,)),
    (r"ffn/(proj_up|proj_up_gate)/kernel", ("embed", "mlp")),
    (r"ffn/(proj_up|proj_up_gate)/bias", ("mlp",)),
    (r"ffn/proj_down/kernel", ("mlp", "embed")),
)
"""The end of a path -> its axes; the first that fits counts. One axis more is `layers`, before."""


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in a tree as "stack/m/mlstm/proj_up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """The names of a parameter's axes; None for one that is never cut.

    Raises:
        KeyError: no row of the table fits; whoever adds a parameter adds its row.
    """
    if ndim == 0:  # a count of an optimiser
        return ()
    for pattern, names in _AXES:
        if re.search(rf"(^|/){pattern}$", path) and ndim - len(names) in (0, 1):
            return ("layers",) * (ndim - len(names)) + names
    raise KeyError(f"{path} with {ndim} axes has no row in the table of logical axes.")


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, cut by the rules in use along the axes of the active mesh (`jax.set_mesh`).

    Args:
        x: an activation.
        names: what each of its axes is, of `LOGICAL_AXES`; None for one that is never cut.

    Without a mesh, and within a `shard_map` that has placed all of it, x is returned as it is.
    """
    left = _axes_of_mesh(AxisType.Auto)
    if all(size == 1 for size in left.values()):
        return x
    spec = cuts(x.shape, [cutting(name) for name in names], left)
    return jax.lax.with_sharding_constraint(x, spec)


def is_cut(name: str) -> bool:
    """Whether the active mesh has more than one device along what cuts this axis."""
    free = free_axes()
    return any(free.get(axis, 1) > 1 for axis in cutting(name))


def cutting(name: str | None) -> tuple[str, ...]:
    """The axes of a mesh that the rules in use give to an axis."""
    return rules_in_use()[name] if name else ()


def free_axes() -> dict[str, int]:
    """Axes of the active mesh and their sizes, without those that a `shard_map` has placed."""
    return _axes_of_mesh(AxisType.Auto, AxisType.Explicit)


def _axes_of_mesh(*wanted: AxisType) -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind in wanted}


def cuts(
    shape: Sequence[int], axes: Iterable[Sequence[str]], sizes: Mapping[str, int]
) -> PartitionSpec:
    """How an array is cut: along each dimension by as many of these axes of a mesh as together
    divide it and cut none before it."""
    used: set[str] = set()
    spec = []
    for length, names in zip(shape, axes, strict=True):
        chosen = dividing(length, [name for name in names if name not in used], sizes)
        used.update(chosen)
        spec.append(chosen[0] if len(chosen) == 1 else chosen or None)
    return PartitionSpec(*spec)


def dividing(length: int, axes: Iterable[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """As many of these axes, as far as there are any, as together divide `length`."""
    chosen, parts = [], 1
    for axis in axes:
        if axis in sizes and length % (parts * sizes[axis]) == 0:
            chosen.append(axis)
            parts *= sizes[axis]
    return tuple(chosen)
