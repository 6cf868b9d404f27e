"""Block sizes of the mLSTM Triton kernels, by a rule on chip, head width and dtype.

The rule takes the widest result per program that compiles without register spills, with loads
pipelined two stages ahead. `experiments/benchmarks/gpu_tiles.py` compiles the rule's blocks and
their neighbors ahead of time for every chip.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import common, gpu
from pallas_kernels.gpu import divisor, width
from pallas_kernels.hardware import ARCHITECTURES
from pallas_kernels.mlstm.chunks import chunk_length


class States(NamedTuple):
    """Blocks of `triton_kernels.states`."""

    k: int  # block of K of one program
    v: int  # block of V of one program
    positions: int  # positions per iteration
    warps: int
    stages: int

    def programs(self, K: int, V: int) -> int:
        """Programs per head."""
        return (K // self.k) * (V // self.v)


class Outputs(NamedTuple):
    """Blocks of `triton_kernels.outputs`, for one of its four results."""

    positions: int  # output positions of one program
    other_positions: int  # positions of the other operand per iteration
    inner: int  # block of the contracted width in products of positions; all of it: one load
    state_inner: int  # block of the contracted width in the product with the state
    width: int  # columns of the result of one program
    warps: int
    stages: int


class Tile(NamedTuple):
    """Tiling of one call."""

    chunk: int  # L, positions in a chunk
    states: States
    h: Outputs
    dq: Outputs
    dk: Outputs
    dv: Outputs


POSITIONS = 64
"""Output positions of one program: M of one matrix instruction of a four-warp group."""


def choose(K: int, V: int, dtype: jnp.dtype, T: int, chunk_size: int | None) -> Tile:
    """The tile of one call on the target or current chip; raises ValueError as in `refusal`."""
    if reason := refusal(K, V, dtype, chunk_size):
        raise ValueError(f"mlstm: {reason}.")
    lanes = common.lanes()
    K, V = width(K, lanes), width(V, lanes)
    if common.interpreter():
        positions = min(lanes, POSITIONS)
        k, v = (divisor(size, positions) for size in (K, V))
        to_v, to_k = (Outputs(positions, positions, a, a, b, 4, 1) for a, b in ((k, v), (v, k)))
        chunk = min(chunk_size or 2 * positions, common.round_up(T, positions))
        return Tile(chunk, States(k, v, positions, 4, 1), h=to_v, dq=to_k, dk=to_k, dv=to_v)
    chip = gpu.current_chip()
    assert chip is not None  # otherwise `gpu.refusal` has rejected the call
    to_v, to_k = (outputs(*sizes, dtype, chip) for sizes in ((K, V), (V, K)))
    return Tile(
        chunk_length(K, V, T, chunk_size, POSITIONS),
        states(K, V, dtype, chip),
        h=to_v,
        dq=to_k,
        dk=to_k,
        dv=to_v,
    )


def refusal(K: int, V: int, dtype: jnp.dtype, chunk_size: int | None = None) -> str | None:
    """Why a call is not supported, naming sizes that are; None if it is."""
    multiple = min(common.lanes(), POSITIONS)
    return common.dtype_refusal(jnp.dtype(dtype)) or common.chunk_refusal(chunk_size, multiple)


def states(K: int, V: int, dtype: jnp.dtype, chip: str) -> States:
    """Blocks of the `states` kernel for a state `K V`."""
    if jnp.dtype(dtype).itemsize == 4:
        return States(divisor(K, 64), divisor(V, 64), 32, 4, 2)
    if chip == "sm_90" and K % 128 == 0 and V % 128 == 0:
        return States(128, 128, 64, 8, 3)  # a third less to load than with 64 rows
    # From Blackwell on, C does not stay in registers between two products.
    warps = 8 if ARCHITECTURES[chip].capability >= 100 else 4
    return States(divisor(K, 64), divisor(V, 128), 64, warps, 3)


def outputs(inner: int, result: int, dtype: jnp.dtype, chip: str) -> Outputs:
    """Blocks of the `outputs` kernel: `inner` is the contracted width, `result` the other."""
    if jnp.dtype(dtype).itemsize == 4:
        # tf32x3 splits each operand into three parts in registers, so blocks are small.
        block, columns = divisor(inner, 32), divisor(result, 128)
        return Outputs(POSITIONS, 32, block, block, columns, 8, 2)
    wide, shared = ARCHITECTURES[chip].has_wide_products, ARCHITECTURES[chip].shared_bytes
    # If it fits, the left operand is loaded once over its full width, for all other positions.
    full_width = divisor(inner, 512 if shared >= 128 << 10 else 256) == inner
    block = inner if full_width else divisor(inner, 128)
    widest = 128 if chip == "sm_120" else 256  # on sm_120, 256 columns use all registers
    columns = divisor(result, 512 if inner <= 256 and wide else widest)
    others = 64 if inner + columns <= (512 if chip == "sm_90" else 384) and full_width else 32
    small = inner + columns <= (256 if wide else 128) or (not full_width and columns <= 64)
    if chip == "sm_90" and not small:
        # Two warp groups: Triton gives each of them columns of the products of positions. It would
        # have both compute all of them if the left operand were loaded over its full width.
        block = max(divisor(inner, min(128, inner // 2)), 16)
        stages = 2 if columns > 256 else 3  # a third one takes more instructions
        return Outputs(POSITIONS, 64, block, divisor(inner, 64), columns, 8, stages)
    return Outputs(POSITIONS, others, block, divisor(inner, 64), columns, 4 if small else 8, 2)
