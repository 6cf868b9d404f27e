"""Host memory of one parameter, shard by shard, and its transfer to the devices of the active mesh.

A process allocates the shards of its own devices only. JAX on a CPU uses this memory without a
copy, so the peak is the model and the tensor that is being read; on other devices the memory is
freed before the next parameter is read.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax import sharding
from xlstm_jax.convert.layouts import Shape
from xlstm_jax.sharding.rules import rules_in_use

_ALIGNMENT = 64  # bytes; what JAX on a CPU needs to use a NumPy buffer without a copy

Index: TypeAlias = tuple[slice, ...]


class Shard(NamedTuple):
    """A part of a parameter, and the devices of this process that have it."""

    where: Index
    host: np.ndarray
    devices: tuple[Any, ...]  # of JAX; None: the default one


class HostParameter(NamedTuple):
    """A parameter that is assembled in host memory."""

    shape: Shape
    sharding: jax.sharding.Sharding | None
    shards: tuple[Shard, ...]

    def parts(self, layer: int | None) -> Iterator[tuple[Index, np.ndarray]]:
        """The slices of a layer that this process has, each with its memory, to be filled.

        Args:
            layer: index on the leading axis; None: the parameter has no such axis.
        """
        for where, host, _ in self.shards:
            if layer is None:
                yield where, host
            elif where[0].start <= layer < where[0].stop:
                yield where[1:], host[layer - where[0].start, ...]

    def to_devices(self) -> jax.Array:
        """The parameter on its devices."""
        if self.sharding is None:
            return jnp.asarray(self.shards[0].host)
        copies = [jax.device_put(s.host, device) for s in self.shards for device in s.devices]
        jax.block_until_ready(copies)  # bounds the memory of transfers that run in the background
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, copies)


def allocate(path: str, leaf: jax.ShapeDtypeStruct) -> HostParameter:
    """Memory for the parameter at a path, sharded on the active mesh, if any."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        everything = tuple(slice(0, size) for size in leaf.shape)
        return HostParameter(
            leaf.shape, None, (Shard(everything, _empty(leaf.shape, leaf.dtype), (None,)),)
        )
    placement = sharding.sharding_of(path, leaf.shape, rules_in_use(), mesh)
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in placement.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None
        bounds = (part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        devices.setdefault(tuple(bounds), []).append(device)
    shards = []
    for bounds, owners in devices.items():
        host = _empty(tuple(stop - start for start, stop in bounds), leaf.dtype)
        shards.append(Shard(tuple(slice(*pair) for pair in bounds), host, tuple(owners)))
    return HostParameter(leaf.shape, placement, tuple(shards))


def _empty(shape: Shape, dtype: Any) -> np.ndarray:
    """An aligned array, which JAX on a CPU uses without a copy."""
    size = np.dtype(dtype).itemsize * math.prod(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
