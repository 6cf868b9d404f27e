"""Sizes of the Triton kernels' blocks by chip, head width and dtype: one rule.

It takes the widest result of one program that the compiler lays out without storing registers, two
loads ahead. `experiments/benchmarks/gpu_tiles.py` compiles what the rule gives, and its neighbours,
for every chip ahead of time.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import common, gpu
from pallas_kernels.gpu import divisor, width
from pallas_kernels.hardware import ARCHITECTURES


class States(NamedTuple):
    """Blocks of `triton_kernels.states`."""

    k: int
    v: int
    positions: int
    warps: int
    stages: int


class Outputs(NamedTuple):
    """Blocks of `triton_kernels.outputs`, for one of its four results."""

    rows: int  # positions of one program
    others: int  # positions looked at together
    inner: int  # of the width that is summed over, in products of positions; the whole is held
    memory: int  # of the width that is summed over, in the product with the memory
    width: int  # of the result of one program
    warps: int
    stages: int


class Tile(NamedTuple):
    """How one call is tiled."""

    chunk: int
    states: States
    h: Outputs
    dq: Outputs
    dk: Outputs
    dv: Outputs


ROWS = 64
"""Positions of one program: what one instruction of a group of four warps multiplies."""

LONG_CHUNK, SHORT_CHUNK = 256, 128
"""A chunk's square costs L (K + V) operations, its state in memory K V / L: they balance near the
root of K V; wider heads than this have the long chunk."""


def choose(K: int, V: int, dtype: jnp.dtype, T: int, chunk_size: int | None) -> Tile:
    """The tile of one call, on the chip at hand or of `common.compiled_for`.

    Raises:
        ValueError: `refusal` has a reason.
    """
    if reason := refusal(K, V, dtype, chunk_size):
        raise ValueError(f"mlstm: {reason}.")
    lanes = common.lanes()
    K, V = width(K, lanes), width(V, lanes)
    if common.interpreter():
        rows = min(lanes, ROWS)
        k, v = (divisor(size, rows) for size in (K, V))
        read, written = (Outputs(rows, rows, a, a, b, 4, 1) for a, b in ((k, v), (v, k)))
        chunk = min(chunk_size or 2 * rows, common.round_up(T, rows))
        return Tile(chunk, States(k, v, rows, 4, 1), read, written, written, read)
    chip = gpu.current_chip()
    assert chip is not None  # or else the call was refused
    chunk = chunk_size or (LONG_CHUNK if K * V > 128 * 256 else SHORT_CHUNK)
    read, written = (outputs(*sizes, dtype, chip) for sizes in ((K, V), (V, K)))
    return Tile(
        min(chunk, common.round_up(T, ROWS)),
        states(K, V, dtype, chip),
        h=read,
        dq=written,
        dk=written,
        dv=read,
    )


def refusal(K: int, V: int, dtype: jnp.dtype, chunk_size: int | None = None) -> str | None:
    """Why no tile serves a call, with sizes that would be served; None: one does."""
    multiple = min(common.lanes(), ROWS)
    return common.refused_dtype(jnp.dtype(dtype)) or common.refused_chunk(chunk_size, multiple)


def states(K: int, V: int, dtype: jnp.dtype, chip: str) -> States:
    """For memories `K V`."""
    if jnp.dtype(dtype).itemsize == 4:
        return States(divisor(K, 64), divisor(V, 64), 32, 4, 2)
    # From Blackwell on the memory is no longer held in registers between two products.
    warps = 8 if ARCHITECTURES[chip].capability >= 100 else 4
    return States(divisor(K, 64), divisor(V, 128), 64, warps, 3)


def outputs(inner: int, result: int, dtype: jnp.dtype, chip: str) -> Outputs:
    """For results of a width, from products over another width."""
    if jnp.dtype(dtype).itemsize == 4:
        # Each operand is three numbers in registers, so little of it may be there at a time.
        block, columns = divisor(inner, 32), divisor(result, 128)
        return Outputs(ROWS, 32, block, block, columns, 8, 2)
    wide, shared = ARCHITECTURES[chip].has_wide_products, ARCHITECTURES[chip].shared_bytes
    # What is summed over is held whole for all products of positions, where there is room.
    whole = divisor(inner, 512 if shared >= 128 << 10 else 256) == inner
    block = inner if whole else divisor(inner, 128)
    widest = 128 if chip == "sm_120" else 256  # of which 256 would take all registers
    columns = divisor(result, 512 if inner <= 256 and wide else widest)
    others = 64 if inner + columns <= (512 if chip == "sm_90" else 384) and whole else 32
    few = inner + columns <= (256 if wide else 128) or (not whole and columns <= 64)
    return Outputs(ROWS, others, block, divisor(inner, 64), columns, 4 if few else 8, 2)
