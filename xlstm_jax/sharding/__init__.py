"""Where arrays lie on a mesh: names of axes, rule tables, meshes, placement of arrays."""

from xlstm_jax.sharding.axes import constrain, logical_axes, path_name
from xlstm_jax.sharding.mesh import MESH_AXES, MeshConfig, make_mesh
from xlstm_jax.sharding.placement import (
    bytes_per_device,
    global_batch,
    partition_spec,
    rows_of_process,
    sharding_of,
    tree_shardings,
)
from xlstm_jax.sharding.rules import RULES, get_rules, use_rules

__all__ = [
    "MESH_AXES",
    "RULES",
    "MeshConfig",
    "bytes_per_device",
    "constrain",
    "get_rules",
    "global_batch",
    "logical_axes",
    "make_mesh",
    "partition_spec",
    "path_name",
    "rows_of_process",
    "sharding_of",
    "tree_shardings",
    "use_rules",
]
