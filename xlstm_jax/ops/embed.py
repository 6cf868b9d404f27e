"""Rows of the table of token vectors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from xlstm_jax.ops.checks import check_shapes
from xlstm_jax.ops.parameters import add_up_cut, cut_of, gather
from xlstm_jax.ops.sharded import cut_by, devices_to_place, placed_by_device
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Float, Int


def embed(
    tokens: Int[Array, "B T"], table: Float[Array, "vocab D"], *, dtype: jnp.dtype | None = None
) -> Float[Array, "B T D"]:
    """table[tokens] in `dtype` (None: that of the table).

    Where devices share the table it travels in `dtype`, and each gets the sum of all gradients of
    its own part, added up in the table's own dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shapes("embed", {"tokens": (tokens, "B T"), "table": (table, "vocab D")})
    dtype = jnp.dtype(dtype or table.dtype)
    if not devices_to_place():
        return jnp.take(table, tokens, axis=0).astype(dtype)
    row = P(cut_by("B", tokens.shape[0]) or None, cut_by("T", tokens.shape[1]) or None)
    cut = cut_of(table.shape, ("vocab", "embed"))
    run = functools.partial(_look_up, cut, dtype, table.dtype, table.shape[0])
    x = placed_by_device(run, (tokens, table), (row, cut), P(*row, None))
    return constrain(x, "batch", "time", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _look_up(cut: P, dtype: Any, table_dtype: Any, num_rows: int, tokens, table):
    """On one device, which holds its cut of the table."""
    return jnp.take(gather(table.astype(dtype), cut), tokens, axis=0)


def _forward(cut, dtype, table_dtype, num_rows, tokens, table):
    return _look_up(cut, dtype, table_dtype, num_rows, tokens, table), tokens


def _backward(cut, dtype, table_dtype, num_rows, tokens, dx):
    rows = dx.astype(table_dtype).reshape(-1, dx.shape[-1])
    whole = jnp.zeros((num_rows, dx.shape[-1]), table_dtype).at[tokens.reshape(-1)].add(rows)
    return None, add_up_cut(whole, cut)


_look_up.defvjp(_forward, _backward)
