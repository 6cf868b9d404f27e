"""Device meshes with the axes data, fsdp, seq and tensor."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from xlstm_jax.config.fields import check_fields, check_range
from xlstm_jax.errors import ConfigError, quote
from xlstm_jax.sharding.rules import RULES, get_rules

# From outer to inner: tensor communicates activations in every layer and needs the fastest links.
MESH_AXES = ("data", "fsdp", "seq", "tensor")

MIN_SHARD_SIZE = 2**18
"""Parameters with fewer elements per layer are replicated under fsdp: an all-gather costs more than
the memory that sharding saves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes, and the rules that shard arrays over them.

    One size may be -1: this axis takes the devices that the others leave.
    """

    data: int = -1  # shards the batch
    fsdp: int = 1  # shards the batch, parameters and optimizer moments
    seq: int = 1  # shards time: sequence (context) parallelism
    tensor: int = 1  # shards heads and features
    rules: str = "auto"  # a name in `rules.RULES`; "auto": the first table that uses these axes
    min_shard_size: int = MIN_SHARD_SIZE  # elements; smaller parameters are replicated under fsdp
    slstm_seq: Literal["gather", "refuse"] = "gather"  # blocks that cannot shard time

    def __post_init__(self):
        check_fields(self, "mesh.", {})
        if self.min_shard_size < 0:  # no upper bound: a huge size replicates everything
            raise ConfigError(
                f"mesh.min_shard_size must be at least 0, got {quote(self.min_shard_size)}; the "
                f"default is {MIN_SHARD_SIZE}."
            )
        free = [name for name in MESH_AXES if getattr(self, name) == -1]
        for name in MESH_AXES:
            way_out = "1 shards nothing, -1 takes the devices that the other axes leave"
            if name not in free:
                check_range(f"mesh.{name}", getattr(self, name), "at least 1", way_out)
        if self.rules not in ("auto", *RULES):
            raise ConfigError(
                f"mesh.rules={quote(self.rules)} is not known; use one of: auto, "
                f"{', '.join(RULES)}."
            )
        if len(free) > 1:
            raise ConfigError(
                f"only one mesh axis may be -1, got {' and '.join(free)}; set the others to a size."
            )

    def sizes(self, count: int) -> dict[str, int]:
        """The size of each axis; raises ConfigError unless they multiply to `count` devices."""
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if count % fixed == 0:
            sizes = {name: count // fixed if size == -1 else size for name, size in sizes.items()}
        if math.prod(sizes.values()) != count or -1 in sizes.values():
            words = ", ".join(f"{name}={size}" for name, size in sizes.items())
            pairs = ", ".join(f"{count // n} x {n}" for n in range(1, count + 1) if count % n == 0)
            raise ConfigError(
                f"the sizes of the mesh axes must multiply to {count}, the number of devices, got "
                f"{words}; with data and one other axis, for example: {pairs}."
            )
        return sizes

    def rules_name(self) -> str:
        """The name of the rules: `rules`, or for "auto" the first that use every axis above 1.

        Raises:
            ConfigError: no rule uses an axis, so its devices would all compute the same.
        """
        # Without data, which all rules use for the batch.
        needed = {name for name in MESH_AXES[1:] if getattr(self, name) != 1}
        used = {name: set().union(*get_rules(name).values()) for name in RULES}
        usable = [name for name, axes in used.items() if needed <= axes]
        if not usable:
            axes = " and ".join(sorted(needed))
            raise ConfigError(f"no sharding rules use {axes} together; set one of them to 1.")
        if self.rules == "auto":
            return usable[0]
        if self.rules not in usable:
            idle = " and ".join(sorted(needed - used[self.rules]))
            raise ConfigError(
                f"mesh.rules={quote(self.rules)} must use the mesh axis {idle}, else its devices "
                f"all compute the same; set the axis to 1, or use one of: {', '.join(usable)}."
            )
        return self.rules


def make_mesh(data: int = -1, fsdp: int = 1, seq: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of all devices of all processes; activate it with `jax.set_mesh`.

    One size may be -1: this axis takes the devices that the others leave. If `jax.default_device`
    is set, the mesh has that device alone.

    Raises:
        ConfigError: the product of the sizes is not the number of devices.
    """
    devices = available_devices()
    sizes = MeshConfig(data=data, fsdp=fsdp, seq=seq, tensor=tensor).sizes(len(devices))
    return build_mesh(devices, sizes)


def build_mesh(devices: Sequence[Any], sizes: dict[str, int]) -> Mesh:
    """Arranges devices in a mesh, with neighbors in the network along the inner axes.

    Several TPU slices, which a slower network connects, are stacked along data, the outermost axis.

    Raises:
        ConfigError: data is not a multiple of the number of slices.
    """
    shape = tuple(sizes[name] for name in MESH_AXES)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(devices) == 1:
        arranged = np.asarray(devices).reshape(shape)
    elif len(slices) == 1 or devices[0].platform != "tpu":
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif sizes["data"] % len(slices):
        raise ConfigError(
            f"data={sizes['data']} must be a multiple of {len(slices)}, the number of slices: "
            "only data may cross the slow network between them; make data larger or fsdp smaller."
        )
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // len(slices), *shape[1:]),
            (len(slices), *(1,) * (len(shape) - 1)),
            devices,
            allow_split_physical_axes=True,
        )
    # Set explicitly, because the default of `jax.make_mesh` is Explicit.
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def available_devices() -> list[Any]:
    """All devices of all processes, or `jax.default_device` alone if it is set."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None or isinstance(chosen, str):  # a string names a platform
        return jax.devices(chosen)
    return [chosen]
