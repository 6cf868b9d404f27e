"""Where each parameter lies on a mesh, by its path and a table of rules."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from xlstm_jax.sharding.axes import logical_axes, partition_spec_for, path_name
from xlstm_jax.sharding.mesh import SMALLEST_CUT
from xlstm_jax.sharding.rules import Rules
from xlstm_jax.typing import PyTree


def partition_spec(
    path: str,
    shape: Sequence[int],
    rules: Rules,
    mesh_sizes: Mapping[str, int],
    smallest: int = SMALLEST_CUT,
) -> PartitionSpec:
    """The mesh axes that cut each axis of a parameter.

    Axes that the mesh lacks, that do not divide an axis of the parameter, or that already cut
    another one, are left out: the parameter is then held whole along it.
    """
    names = logical_axes(path, len(shape))
    one_layer = math.prod(n for n, name in zip(shape, names, strict=True) if name != "layers")
    axes = [rules[name] if name else () for name in names]
    if one_layer < smallest:
        axes = [[axis for axis in chosen if axis != "fsdp"] for chosen in axes]
    return partition_spec_for(shape, axes, mesh_sizes)


def sharding_of(
    path: str,
    shape: Sequence[int],
    rules: Rules,
    mesh: jax.sharding.Mesh,
    smallest: int = SMALLEST_CUT,
) -> NamedSharding:
    """The sharding of a parameter on a mesh."""
    return NamedSharding(mesh, partition_spec(path, shape, rules, dict(mesh.shape), smallest))


def tree_shardings(
    tree: PyTree, rules: Rules, mesh: jax.sharding.Mesh, smallest: int = SMALLEST_CUT
) -> PyTree:
    """The sharding of every leaf of a tree that has the paths of parameters in it.

    A `TrainState`, or its shapes: moments lie as their parameters do, numbers are everywhere.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding_of(path_name(path), leaf.shape, rules, mesh, smallest), tree
    )


def bytes_per_device(params: PyTree, rules: Rules, mesh_sizes: Mapping[str, int]) -> int:
    """What one device holds of parameters, or of a tree with the paths of parameters in it."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        spec = partition_spec(path_name(path), leaf.shape, rules, mesh_sizes)
        axes = [axis for cut in spec if cut for axis in ((cut,) if isinstance(cut, str) else cut)]
        parts = math.prod(mesh_sizes[axis] for axis in axes)
        total += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize // parts
    return total
