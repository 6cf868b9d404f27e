"""Meshes: devices along the axes data, fsdp, seq, tensor."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from xlstm_jax.config import ConfigError
from xlstm_jax.sharding.rules import RULES

MESH_AXES = ("data", "fsdp", "seq", "tensor")

MIN_SHARD_SIZE = 2**18
"""Parameters of fewer elements (of one layer) stay replicated under fsdp: gathering them costs more
than the memory they take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of a mesh, and what is sharded over these axes.

    One axis may be -1: it takes the devices that the others leave.
    """

    data: int = -1  # the batch
    fsdp: int = 1  # the batch, parameters and moments
    seq: int = 1  # time: each sequence
    tensor: int = 1  # heads and features
    rules: str = "auto"  # a name in `rules.RULES`; "auto": the first table that uses these axes
    min_shard_size: int = MIN_SHARD_SIZE  # elements; smaller parameters are replicated under fsdp
    slstm_seq: Literal["gather", "refuse"] = "gather"  # time of an sLSTM, which is never sharded

    def __post_init__(self):
        free = [name for name in MESH_AXES if getattr(self, name) == -1]
        for name in MESH_AXES:
            if getattr(self, name) < 1 and name not in free:
                raise ConfigError(
                    f"mesh.{name} must be at least 1, got {getattr(self, name)}; 1 shards nothing, "
                    "-1 takes the devices that the other axes leave."
                )
        if self.rules not in ("auto", *RULES):
            raise ConfigError(
                f"mesh.rules={self.rules!r} is not known; use one of: auto, {', '.join(RULES)}."
            )
        if len(free) > 1:
            raise ConfigError(
                f"one axis of a mesh may be -1, got {' and '.join(free)}; give all others a size."
            )

    def sizes(self, count: int) -> dict[str, int]:
        """Devices along each axis, of `count` in all.

        Raises:
            ConfigError: they do not multiply to `count`.
        """
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if count % fixed == 0:
            sizes = {name: count // fixed if size == -1 else size for name, size in sizes.items()}
        if math.prod(sizes.values()) != count or -1 in sizes.values():
            words = ", ".join(f"{name}={size}" for name, size in sizes.items())
            pairs = ", ".join(f"{count // n} x {n}" for n in range(1, count + 1) if count % n == 0)
            raise ConfigError(
                f"the sizes of a mesh must multiply to {count}, the number of devices, got "
                f"{words}; with one axis beside data, for example: {pairs}."
            )
        return sizes

    def rules_name(self) -> str:
        """The table of rules, chosen or the first that uses every axis that is not 1.

        Raises:
            ConfigError: devices along an axis would all do the same.
        """
        needed = {name for name in MESH_AXES[1:] if getattr(self, name) != 1}
        used = {name: set().union(*table.values()) for name, table in RULES.items()}
        usable = [name for name, axes in used.items() if needed <= axes]
        if not usable:
            axes = " and ".join(sorted(needed))
            raise ConfigError(
                f"no table of rules shards over {axes} at once; set one of them to 1."
            )
        if self.rules == "auto":
            return usable[0]
        if self.rules not in usable:
            idle = " and ".join(sorted(needed - used[self.rules]))
            raise ConfigError(
                f"mesh.rules={self.rules!r} has no use for the axis {idle}, whose devices would "
                f"all do the same; set it to 1, or use one of: {', '.join(usable)}."
            )
        return self.rules


def make_mesh(data: int = -1, fsdp: int = 1, seq: int = 1, tensor: int = 1) -> Mesh:
    """All devices of the process, or of all processes, as a mesh; enter it with `jax.set_mesh`.

    One size may be -1: it takes what the others leave. Where `jax.default_device` names a device,
    the mesh is that one alone.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = available()
    sizes = MeshConfig(data=data, fsdp=fsdp, seq=seq, tensor=tensor).sizes(len(devices))
    return mesh_of(devices, sizes)


def mesh_of(devices: Sequence[Any], sizes: dict[str, int]) -> Mesh:
    """These devices along the axes of a mesh, neighbors in the network along the inner axes.

    Several TPU slices, which a slower network joins, are stacked along data, the outermost axis.

    Raises:
        ConfigError: data does not divide by the number of slices.
    """
    shape = tuple(sizes[name] for name in MESH_AXES)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(devices) == 1:
        arranged = np.asarray(devices).reshape(shape)
    elif len(slices) == 1 or devices[0].platform != "tpu":
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif sizes["data"] % len(slices):
        raise ConfigError(
            f"data={sizes['data']} must be a multiple of {len(slices)}, the number of slices: only "
            "whole rows cross the slow network between them; make data larger or fsdp smaller."
        )
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // len(slices), *shape[1:]),
            (len(slices), *(1,) * (len(shape) - 1)),
            devices,
            allow_split_physical_axes=True,
        )
    # Stated, as the default of jax.make_mesh is another one.
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def available() -> list[Any]:
    """All devices of all processes, or `jax.default_device` alone where it is set."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None or isinstance(chosen, str):
        return jax.devices(chosen)
    return [chosen]
