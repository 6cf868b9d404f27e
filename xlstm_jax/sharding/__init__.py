"""Where arrays lie on a mesh: names of axes, rule tables, placement of parameters."""

from xlstm_jax.sharding.axes import logical_axes, path_name
from xlstm_jax.sharding.mesh import MESH_AXES, make_mesh
from xlstm_jax.sharding.placement import bytes_per_device, partition_spec, sharding_of
from xlstm_jax.sharding.rules import RULES, get_rules

__all__ = [
    "MESH_AXES",
    "RULES",
    "bytes_per_device",
    "get_rules",
    "logical_axes",
    "make_mesh",
    "partition_spec",
    "path_name",
    "sharding_of",
]
