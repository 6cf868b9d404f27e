"""A mesh with its sharding rules: how the state and the batches of a run are sharded."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xlstm_jax.sharding.mesh import MIN_SHARD_SIZE, MeshConfig, available_devices, build_mesh
from xlstm_jax.sharding.placement import tree_shardings
from xlstm_jax.sharding.rules import Rules, get_rules, use_rules
from xlstm_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Share:
    """One of `count` contiguous, equal blocks of a batch."""

    index: int
    count: int


@dataclasses.dataclass(frozen=True)
class Devices:
    """The device mesh of a run and the rules by which arrays are sharded over it."""

    mesh: Mesh
    rules: Rules
    min_shard_size: int = MIN_SHARD_SIZE

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, functions are compiled for, and must be called on, these devices."""
        with jax.set_mesh(self.mesh), use_rules(self.rules):
            yield

    def shardings(self, tree: PyTree) -> PyTree:
        """The sharding of every leaf of a `TrainState` or of another tree of parameters."""
        return tree_shardings(tree, self.rules, self.mesh, self.min_shard_size)

    def constrain(self, tree: PyTree) -> PyTree:
        """Constrains a tree to its `shardings` inside a compiled function."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def batch_sharding(self, ndim: int = 2) -> NamedSharding:
        """The sharding of a leaf of a batch, `B` or `B T`."""
        return self.sharding(*("batch", "time")[:ndim])

    def sharding(self, *names: str | None) -> NamedSharding:
        """The sharding of an array whose first dimensions have these logical axes."""
        # The rules write () for a replicated axis, a partition spec writes None.
        axes = ((self.rules[name] if name else ()) or None for name in names)
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of a value that is copied to every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def replicate(self, tree: PyTree) -> PyTree:
        """Copies host values, which must be equal in every process, to every device."""

        def put(x: Any) -> jax.Array:
            x = np.asarray(x)
            # Each process fills the devices it addresses; nothing is communicated.
            return jax.make_array_from_callback(x.shape, self.replicated, x.__getitem__)

        return jax.tree.map(put, tree)

    def batch(self, leaves: PyTree, batch_size: int | None = None) -> PyTree:
        """Shards a batch on the host over all devices.

        Args:
            leaves: NumPy arrays, `B` or `B T`: the global batch, or this process' share of it.
            batch_size: size of the global batch; None means that `leaves` are all of it.
        """

        def shard_leaf(x: np.ndarray) -> jax.Array:
            shape = (len(x) if batch_size is None else batch_size, *x.shape[1:])
            # Global index of the first local sequence; 0 if this process has the global batch.
            first = 0 if len(x) == shape[0] else self.share_of_batch(shape[0]).index * len(x)

            def shard(index: tuple[slice, ...] | None) -> np.ndarray:  # of the global array
                assert index is not None
                start, stop, _ = index[0].indices(shape[0])
                return x[(slice(start - first, stop - first), *index[1:])]

            # int64 indices become int32 where JAX runs without 64-bit types.
            x = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
            return jax.make_array_from_callback(shape, self.batch_sharding(x.ndim), shard)

        return jax.tree.map(shard_leaf, leaves)

    def share_of_batch(self, batch_size: int) -> Share:
        """The part of a global batch that the devices of this process need.

        It is one of several equal blocks, or the global batch if the sequences do not form such a
        block.
        """
        indices = self.batch_sharding(1).addressable_devices_indices_map((batch_size,))
        bounds = [index[0].indices(batch_size)[:2] for index in indices.values() if index]
        start, stop = min(first for first, _ in bounds), max(last for _, last in bounds)
        size = stop - start
        # Unequal or unaligned blocks: every process loads the batch and its devices pick from it.
        if batch_size % size or start % size:
            return Share(0, 1)
        return Share(start // size, batch_size // size)


def make_devices(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Devices:
    """The mesh of a run with its sharding rules.

    Args:
        devices: None uses all devices of all processes, or `jax.default_device` if it is set.

    Raises:
        ConfigError: the product of the sizes is not the number of devices, or no rule uses an axis.
    """
    devices = available_devices() if devices is None else devices
    rules = get_rules(cfg.rules_name())
    return Devices(build_mesh(devices, cfg.sizes(len(devices))), rules, cfg.min_shard_size)
