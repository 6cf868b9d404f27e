"""Logical axes of parameters and activations, and their partition specs under the rules in use.

Tables map path suffixes of parameters to logical axes: `_AXES` for parameters that all models
share, and one table per block kind, which `modules` registers. The path of an optimizer moment ends
with that of its parameter and matches the same entry. Activations get theirs from `constrain`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from xlstm_jax.sharding.rules import check_mesh_axes, rules_in_use
from xlstm_jax.typing import Size

Axes = tuple[str | None, ...]

_AXES: tuple[tuple[str, Axes], ...] = (
    # `embed` is sharded over fsdp only if `vocab` is not: a spec uses each mesh axis once.
    (r"token_embedding/embedding", ("vocab", "embed")),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r"(\w*norm|norm_\w+)/(scale|scale_offset|bias)", (None,)),
    (r"(out_proj|proj_down)/bias", (None,)),
    (r"conv/kernel", (None, None)),  # W F: a few taps per channel
    (r"conv/kernel", (None, "embed", None)),  # W F F_out: mixes channels
    (r"conv/bias", (None,)),
    (r"ffn/(proj_up|proj_up_gate)/kernel", ("embed", "mlp")),
    (r"ffn/(proj_up|proj_up_gate)/bias", ("mlp",)),
    (r"ffn/proj_down/kernel", ("mlp", "embed")),
    (r"ns_coeffs", (None,)),  # of Muon: coefficients of its iteration
)
"""(path suffix, logical axes); the first match wins. An extra leading axis is `layers`."""

_ADAPTERS = {"lora_a": -1, "lora_b": -2}
"""Last part of the path of a low-rank adapter of a kernel -> its axis that is the rank."""

# Registered by `modules`, which this package must not import.
_block_axes: Callable[[str], Mapping[str, Axes]] = lambda letter: {}  # noqa: E731


def set_block_axes(axes_of: Callable[[str], Mapping[str, Axes]]) -> None:
    """Registers the logical axes of block parameters, whose paths contain `stack/LETTER/`.

    `axes_of` maps a letter to a table like `_AXES`, which takes precedence over `_AXES`.
    """
    global _block_axes
    _block_axes = axes_of


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as a string, such as "stack/m/mlstm/proj_up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(path: str, ndim: int) -> Axes:
    """The logical axes of a parameter; None for an axis that is never sharded.

    Raises:
        KeyError: no entry of `_AXES` or of the block kind's `axes` matches.
    """
    if ndim == 0:  # a scalar of the optimizer, such as its step count
        return ()
    kernel, _, name = path.rpartition("/")
    if name in _ADAPTERS:  # those of the kernel, and its rank, which is not sharded
        axes = list(logical_axes(kernel, ndim))
        axes[_ADAPTERS[name]] = None
        return tuple(axes)
    block = re.search(r"(?:^|/)stack/([^/]+)/", path)
    block_axes = _block_axes(block[1]).items() if block else ()
    for pattern, axes in (*block_axes, *_AXES):
        if re.search(rf"(^|/){pattern}$", path):
            if ndim - len(axes) in (0, 1):
                return ("layers",) * (ndim - len(axes)) + axes
            if ndim < len(axes):  # of the optimizer: sums over some axes, as in Adafactor
                return (None,) * ndim
    # Raise instead of replicating, which would silently use memory on every device.
    raise KeyError(
        f"{path} with {ndim} axes has no entry in the table of logical axes; add one to the `axes` "
        "of its block kind."
    )


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains x to the sharding that the rules in use give on the active mesh.

    Without an active mesh (`jax.set_mesh`), and inside a `shard_map` over all of its axes, x is
    returned unchanged. On Explicit axes the sharding becomes a part of the type of x.

    `names` are the logical axes of the dimensions, from `LOGICAL_AXES`; None is never sharded.
    """
    if not any(size > 1 for size in free_axes().values()):
        return x
    axes = [mesh_axes_for(name) for name in names]
    auto, explicit = _axes_of_mesh(AxisType.Auto), _axes_of_mesh(AxisType.Explicit)
    if explicit:
        x = jax.sharding.reshard(x, partition_spec_for(x.shape, axes, explicit))
    if auto:
        x = jax.lax.with_sharding_constraint(x, partition_spec_for(x.shape, axes, auto))
    return x


def is_sharded(name: str) -> bool:
    """Whether the active mesh shards this logical axis over more than one device."""
    sizes = free_axes()
    return any(sizes.get(axis, 1) > 1 for axis in mesh_axes_for(name))


def mesh_axes_for(name: str | None) -> tuple[str, ...]:
    """The mesh axes over which the rules in use shard a logical axis."""
    return rules_in_use()[name] if name else ()


def free_axes() -> dict[str, int]:
    """Sizes of the axes of the active mesh that no enclosing `shard_map` has made Manual.

    Raises:
        ArgumentError: the rules in use do not name an axis with several devices.
    """
    sizes = _axes_of_mesh(AxisType.Auto, AxisType.Explicit)
    check_mesh_axes(sizes)
    return sizes


def _axes_of_mesh(*axis_types: AxisType) -> dict[str, int]:
    # The abstract mesh, unlike the concrete one, is available while tracing.
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in types if kind in axis_types}


def partition_spec_for(
    shape: Sequence[Size], axes: Iterable[Sequence[str]], sizes: Mapping[str, int]
) -> PartitionSpec:
    """The partition spec of an array of this shape.

    Each dimension is sharded over those of its mesh axes that divide it and are not used by an
    earlier dimension.
    """
    used: set[str] = set()  # a partition spec may contain a mesh axis only once
    spec = []
    for length, names in zip(shape, axes, strict=True):
        chosen = dividing_axes(length, [name for name in names if name not in used], sizes)
        used.update(chosen)
        spec.append(chosen[0] if len(chosen) == 1 else chosen or None)
    return PartitionSpec(*spec)


def dividing_axes(length: Size, axes: Iterable[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes whose product divides `length`, chosen greedily in order.

    Axes that the mesh lacks are skipped.
    """
    chosen, num_shards = [], 1
    for axis in axes:
        if axis in sizes and length % (num_shards * sizes[axis]) == 0:
            chosen.append(axis)
            num_shards *= sizes[axis]
    return tuple(chosen)
