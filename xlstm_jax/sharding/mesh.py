"""Meshes: devices along the axes data, fsdp, seq, tensor."""

import math

import jax
from jax.sharding import AxisType

from xlstm_jax.config import ConfigError

MESH_AXES = ("data", "fsdp", "seq", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, seq: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """All devices of the process, or of all processes, as a mesh; enter it with `jax.set_mesh`.

    One size may be -1: it takes what the others leave.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "seq": seq, "tensor": tensor}
    count = jax.device_count()
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and fixed > 0 and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != count:
        words = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"the sizes of a mesh must multiply to {count}, the number of devices, got {words}; "
            f"with one axis beside data, for example: {_factorisations(count)}."
        )
    # Explicit, as the default of make_mesh is another one.
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types)


def _factorisations(count: int) -> str:
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    return ", ".join(f"{count // n} x {n}" for n in divisors)
