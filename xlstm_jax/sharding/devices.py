"""A mesh and its rules together: how everything of a run is sharded."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xlstm_jax.sharding.mesh import MIN_SHARD_SIZE, MeshConfig, available, mesh_of
from xlstm_jax.sharding.placement import tree_shardings
from xlstm_jax.sharding.rules import Rules, get_rules, use_rules
from xlstm_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Share:
    """One of several blocks of a batch."""

    index: int
    count: int


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run along the axes of a mesh, and what is sharded over these axes."""

    mesh: Mesh
    rules: Rules
    min_shard_size: int = MIN_SHARD_SIZE

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within, functions are compiled for these devices; call what was compiled here as well."""
        with jax.set_mesh(self.mesh), use_rules(self.rules):
            yield

    def shardings(self, tree: PyTree) -> PyTree:
        """A sharding for every leaf of a `TrainState`, or of another tree of parameters."""
        return tree_shardings(tree, self.rules, self.mesh, self.min_shard_size)

    def constrain(self, tree: PyTree) -> PyTree:
        """The tree, constrained inside a compiled function to its `shardings`."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def batch_sharding(self, ndim: int = 2) -> NamedSharding:
        """The sharding of a leaf of a batch, `B` or `B T`."""
        axes = (self.rules["batch"] or None, self.rules["time"] or None)
        return NamedSharding(self.mesh, PartitionSpec(*axes[:ndim]))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of a value of which every device has a copy."""
        return NamedSharding(self.mesh, PartitionSpec())

    def replicate(self, tree: PyTree) -> PyTree:
        """Values on the host, the same ones in every process, as a copy on every device."""

        def put(x: Any) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, self.replicated, x.__getitem__)

        return jax.tree.map(put, tree)

    def batch(self, leaves: PyTree, batch_size: int | None = None) -> PyTree:
        """A batch on the host as arrays sharded over all devices.

        Args:
            leaves: NumPy arrays, `B` or `B T`: the batch, or this process' share of it.
            batch_size: of the global batch; None: this is all of it.
        """

        def place(x: np.ndarray) -> jax.Array:
            shape = (len(x) if batch_size is None else batch_size, *x.shape[1:])
            first = 0 if len(x) == shape[0] else self.share_of_rows(shape[0]).index * len(x)

            def shard(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                start, stop, _ = index[0].indices(shape[0])
                return x[(slice(start - first, stop - first), *index[1:])]

            x = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
            return jax.make_array_from_callback(shape, self.batch_sharding(x.ndim), shard)

        return jax.tree.map(place, leaves)

    def share_of_rows(self, num_rows: int) -> Share:
        """The sequences of a batch that the devices of this process need.

        One of several blocks of equal size; all of them, where they are not one such block.
        """
        indices = self.batch_sharding(1).addressable_devices_indices_map((num_rows,))
        bounds = [index[0].indices(num_rows)[:2] for index in indices.values() if index]
        start, stop = min(first for first, _ in bounds), max(last for _, last in bounds)
        size = stop - start
        if num_rows % size or start % size:
            return Share(0, 1)
        return Share(start // size, num_rows // size)


def make_devices(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Devices:
    """The devices of this run as a mesh.

    Args:
        cfg: sizes and rules.
        devices: which; None takes all of all processes, or `jax.default_device` where it is set.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or an axis has no use.
    """
    devices = available() if devices is None else devices
    rules = get_rules(cfg.rules_name())
    return Devices(mesh_of(devices, cfg.sizes(len(devices))), rules, cfg.min_shard_size)
