"""Sharding of arrays over a device mesh: meshes, logical axes and sharding rules."""

from xlstm_jax.sharding.axes import constrain, is_sharded, logical_axes, path_name
from xlstm_jax.sharding.devices import Devices, make_devices
from xlstm_jax.sharding.distributed import Processes, init_distributed
from xlstm_jax.sharding.mesh import MESH_AXES, MeshConfig, make_mesh
from xlstm_jax.sharding.placement import (
    bytes_per_device,
    partition_spec,
    sharding_of,
    tree_shardings,
)
from xlstm_jax.sharding.rules import RULES, get_rules, use_rules

__all__ = [
    "MESH_AXES",
    "RULES",
    "Devices",
    "MeshConfig",
    "Processes",
    "bytes_per_device",
    "constrain",
    "get_rules",
    "init_distributed",
    "is_sharded",
    "logical_axes",
    "make_devices",
    "make_mesh",
    "partition_spec",
    "path_name",
    "sharding_of",
    "tree_shardings",
    "use_rules",
]
