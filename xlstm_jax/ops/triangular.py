"""Inverses of unit lower triangular matrices, by products of blocks.

JAX's `triangular_solve` waits for CPU threads, all of which may be taken by devices or products
that wait for each other: a gradient on one device and a step on eight deadlocked (jaxlib 0.10.2).
On accelerators it is a loop over rows.
"""

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.typing import Array, Float

BASE = 8
"""Size of the blocks that are inverted row by row."""


@jax.custom_jvp
def unit_lower_inverse(M: Float[Array, "Z L L"]) -> Float[Array, "Z L L"]:
    """(I + M)^-1; elements of M on and above the diagonal are ignored.

    Diagonal blocks are inverted and joined in pairs, as in forward substitution with blocks; no
    power of M is computed, which could be far larger than the result.
    """
    Z, L, _ = M.shape
    size = max(BASE, 1 << (L - 1).bit_length())
    M = jnp.pad(M, ((0, 0), (0, size - L), (0, size - L)))
    blocks = _invert_rows(_diagonal_blocks(M, BASE))
    width = BASE
    while width < size:
        below = _diagonal_blocks(M, 2 * width)[:, :, width:, :width]
        first, second = blocks[:, 0::2], blocks[:, 1::2]
        corner = -exact_einsum(
            "ZNAB,ZNBC->ZNAC", exact_einsum("ZNAB,ZNBC->ZNAC", second, below), first
        )
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        blocks = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        width *= 2
    return blocks[:, 0, :L, :L]


@unit_lower_inverse.defjvp
def _inverse_jvp(primals, tangents):
    (M,), (dM,) = primals, tangents
    inverse = unit_lower_inverse(M)
    dM = jnp.tril(dM, -1)
    product = exact_einsum("ZAB,ZBC->ZAC", exact_einsum("ZAB,ZBC->ZAC", inverse, dM), inverse)
    return inverse, -product


def _diagonal_blocks(M: Float[Array, "Z S S"], width: int) -> Float[Array, "Z N W W"]:
    Z, size, _ = M.shape
    blocks = M.reshape(Z, size // width, width, size // width, width)
    return jnp.stack([blocks[:, n, :, n] for n in range(size // width)], axis=1)


def _invert_rows(M: Float[Array, "Z N W W"]) -> Float[Array, "Z N W W"]:
    """Row i of the inverse is e_i - sum over j < i of M[i, j] times row j."""
    width = M.shape[-1]
    rows: list[Array] = []
    for i in range(width):
        unit = jnp.zeros(width, M.dtype).at[i].set(1)
        row = jnp.broadcast_to(unit, (*M.shape[:2], width))
        for j, earlier in enumerate(rows):
            row = row - M[..., i, j, None] * earlier
        rows.append(row)
    return jnp.stack(rows, axis=-2)
