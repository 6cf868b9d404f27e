"""Partition specs and shardings of parameters, from their paths and the sharding rules."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from xlstm_jax.sharding.axes import logical_axes, partition_spec_for, path_name
from xlstm_jax.sharding.mesh import MIN_SHARD_SIZE
from xlstm_jax.sharding.rules import PartialRules, complete, get_rules
from xlstm_jax.typing import PyTree


def partition_spec(
    path: str,
    shape: Sequence[int],
    rules: str | PartialRules,
    mesh_sizes: Mapping[str, int],
    min_shard_size: int = MIN_SHARD_SIZE,
) -> PartitionSpec:
    """The partition spec of a parameter.

    A mesh axis is left out if the mesh lacks it, if its size does not divide the dimension, or if
    it already shards another dimension. The parameter is then replicated over this axis.
    """
    rules = get_rules(rules) if isinstance(rules, str) else complete(rules)
    names = logical_axes(path, len(shape))
    # The size of one layer counts: stacking must not change whether a parameter is sharded.
    one_layer = math.prod(n for n, name in zip(shape, names, strict=True) if name != "layers")
    axes = [rules[name] if name else () for name in names]
    # Only fsdp is dropped: tensor splits the computation, not just the storage.
    if one_layer < min_shard_size:
        axes = [[axis for axis in chosen if axis != "fsdp"] for chosen in axes]
    return partition_spec_for(shape, axes, mesh_sizes)


def sharding_of(
    path: str,
    shape: Sequence[int],
    rules: str | PartialRules,
    mesh: Mesh | AbstractMesh,
    min_shard_size: int = MIN_SHARD_SIZE,
) -> NamedSharding:
    """The sharding of a parameter on a mesh."""
    return NamedSharding(mesh, partition_spec(path, shape, rules, dict(mesh.shape), min_shard_size))


def tree_shardings(
    tree: PyTree,
    rules: str | PartialRules,
    mesh: Mesh | AbstractMesh,
    min_shard_size: int = MIN_SHARD_SIZE,
) -> PyTree:
    """The sharding of every leaf of a tree whose paths contain those of parameters.

    In a `TrainState`, or its shapes, moments are sharded like their parameters and scalars are
    replicated.
    """

    def of_leaf(path, leaf):
        return sharding_of(path_name(path), leaf.shape, rules, mesh, min_shard_size)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def bytes_per_device(
    params: PyTree,
    rules: str | PartialRules,
    mesh_sizes: Mapping[str, int],
    min_shard_size: int = MIN_SHARD_SIZE,
) -> int:
    """Bytes per device of a tree of parameters, or of a tree whose paths contain theirs."""
    # Abstract, so that a mesh can be larger than the attached devices.
    mesh = AbstractMesh(tuple(mesh_sizes.values()), tuple(mesh_sizes))
    shardings = tree_shardings(params, rules, mesh, min_shard_size)
    return sum(jax.tree.leaves(jax.tree.map(shard_bytes, params, shardings)))


def shard_bytes(leaf: Any, sharding: NamedSharding) -> int:
    """Bytes per device of an array, or of its shape."""
    return math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
