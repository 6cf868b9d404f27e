"""Token embedding lookup."""

import jax.numpy as jnp

from xlstm_jax.ops.checks import check_shapes
from xlstm_jax.ops.sharded import parameters
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.ops.sharded.shard_map import auto_mesh_axes
from xlstm_jax.sharding.axes import constrain
from xlstm_jax.typing import Array, Float, Int


@on_any_mesh("B T D")
def embed(
    tokens: Int[Array, "B T"], table: Float[Array, "vocab D"], *, dtype: jnp.dtype | None = None
) -> Float[Array, "B T D"]:
    """table[tokens] in `dtype` (None: that of the table).

    A sharded table is all-gathered in `dtype`; its gradient is reduce-scattered in its own dtype.

    Raises:
        ValueError: inconsistent shapes.
    """
    check_shapes("embed", {"tokens": (tokens, "B T"), "table": (table, "vocab D")})
    dtype = jnp.dtype(dtype or table.dtype)
    if not auto_mesh_axes():
        # Look-up before the cast: only the embeddings of the batch are converted.
        return jnp.take(table, tokens, axis=0).astype(dtype)
    return constrain(parameters.embed(tokens, table, dtype), "batch", "time", None)
