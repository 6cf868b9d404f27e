"""The sharding of each parameter on a mesh, by its path and a table of rules."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from xlstm_jax.sharding.axes import logical_axes, partition_spec_for, path_name
from xlstm_jax.sharding.mesh import MIN_SHARD_SIZE
from xlstm_jax.sharding.rules import Rules
from xlstm_jax.typing import PyTree


def partition_spec(
    path: str,
    shape: Sequence[int],
    rules: Rules,
    mesh_sizes: Mapping[str, int],
    min_shard_size: int = MIN_SHARD_SIZE,
) -> PartitionSpec:
    """The mesh axes over which each axis of a parameter is sharded.

    Axes that the mesh lacks, that do not divide an axis of the parameter, or that are already used
    for another one, are left out: the parameter is then replicated over them.
    """
    names = logical_axes(path, len(shape))
    one_layer = math.prod(n for n, name in zip(shape, names, strict=True) if name != "layers")
    axes = [rules[name] if name else () for name in names]
    if one_layer < min_shard_size:
        axes = [[axis for axis in chosen if axis != "fsdp"] for chosen in axes]
    return partition_spec_for(shape, axes, mesh_sizes)


def sharding_of(
    path: str,
    shape: Sequence[int],
    rules: Rules,
    mesh: Mesh | AbstractMesh,
    min_shard_size: int = MIN_SHARD_SIZE,
) -> NamedSharding:
    """The sharding of a parameter on a mesh."""
    return NamedSharding(mesh, partition_spec(path, shape, rules, dict(mesh.shape), min_shard_size))


def tree_shardings(
    tree: PyTree, rules: Rules, mesh: Mesh | AbstractMesh, min_shard_size: int = MIN_SHARD_SIZE
) -> PyTree:
    """The sharding of every leaf of a tree that has the paths of parameters in it.

    A `TrainState`, or its shapes: moments are sharded like their parameters, scalars replicated.
    """

    def of_leaf(path, leaf):
        return sharding_of(path_name(path), leaf.shape, rules, mesh, min_shard_size)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def bytes_per_device(
    params: PyTree,
    rules: Rules,
    mesh_sizes: Mapping[str, int],
    min_shard_size: int = MIN_SHARD_SIZE,
) -> int:
    """Bytes on each device of parameters, or of a tree with the paths of parameters in it."""
    mesh = AbstractMesh(tuple(mesh_sizes.values()), tuple(mesh_sizes))
    shardings = tree_shardings(params, rules, mesh, min_shard_size)

    def shard_bytes(leaf, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(shard_bytes, params, shardings)))
