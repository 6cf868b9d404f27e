"""Blocks of the sLSTM's TPU kernels: heads, sequences and steps of one program that fit VMEM."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.hardware import MIB, TPUS
from pallas_kernels.tpu import SCOPED_BYTES, current_chip, num_terms

ROWS = 8
"""Batches are padded to a multiple of the rows of a tile (in bfloat16 half a tile suffices)."""

MAX_ROWS = 64
"""Rows of one program: with more, what a step computes on no longer stays near the registers."""

MAX_HEADS = 4
"""Heads of one program: while one waits for the matrix unit another has work to do."""

MAX_STEPS = 32
"""Steps of one program; by then the cost of starting one is divided away."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a call is divided among programs."""

    heads: int  # of one program
    rows: int  # of the padded batch, of one program
    steps: int  # of one program
    num_rows: int  # of the padded batch
    num_steps: int  # of the padded sequence

    @property
    def unroll(self) -> int:
        """Steps in the body of the loop: two chains of few heads overlap a little."""
        return 2 if self.heads <= 2 and self.steps % 2 == 0 else 1


class Tile(NamedTuple):
    """What is static of a call."""

    blocks: Blocks
    heads: int  # narrow heads side by side in the lanes of one wide head
    width: int  # of that head, a multiple of the lanes
    vmem_bytes: int  # limit of the kernels


def choose(B: int, T: int, H: int, K: int, dtype: jnp.dtype) -> Tile:
    """The tile of one call on the current chip.

    Raises:
        ValueError: `refusal` has a reason.
    """
    if reason := refusal(K, dtype):
        raise ValueError(f"slstm: {reason}.")
    most = min(H, max(1, common.lanes() // K))
    heads = max(heads for heads in range(1, most + 1) if H % heads == 0)
    width, budget = common.round_up(heads * K, common.lanes()), vmem_limit()
    divided = blocks(B, T, H // heads, width, dtype, budget)
    assert divided is not None  # or else the call was refused
    return Tile(divided, heads, width, budget)


def refusal(K: int, dtype: jnp.dtype, chip: str | None = None) -> str | None:
    """Why no kernel supports heads of width K, with a width that is supported, or None."""
    if reason := common.refused_dtype(jnp.dtype(dtype)):
        return reason
    budget = vmem_limit(chip)
    widest_head = widest(jnp.dtype(dtype), budget)
    if common.round_up(K, common.lanes()) <= widest_head:
        return None
    return (
        f"the recurrent weights of heads of K={K} in {dtype} do not fit {budget / MIB:.0f} MiB of "
        f"VMEM; K={widest_head} fits: use more heads"
    )


def step_fits(tile: Tile, x: jax.Array, r: jax.Array) -> bool:
    """Whether one step, with the state of all heads and the weights of two, fits the limit."""
    B, H, K = (x.shape[axis] for axis in (0, 3, 4))
    B, H = (common.round_up(size, ROWS) for size in (B, H))
    K = common.round_up(K, common.lanes())
    weights = 2 * 4 * K * K * r.dtype.itemsize
    converted = 4 * K * K * x.dtype.itemsize
    needed = weights + converted + 2 * 2 * 4 * B * H * K * 4 + B * K * 4 * (2 * 4 + 16)
    return needed <= tile.vmem_bytes


def vmem_limit(chip: str | None = None) -> int:
    """What a kernel may use of VMEM: all of a small one, half of a large one."""
    chip = chip or current_chip()
    if common.interpreter() or chip is None:
        return SCOPED_BYTES
    return max(SCOPED_BYTES, TPUS[chip].vmem_bytes // 2)


def vmem_bytes(B: int, K: int, dtype: jnp.dtype, steps: int, *, heads: int = 1) -> int:
    """VMEM that one program of the largest kernel needs.

    B, a multiple of `ROWS`, `steps` and `heads` are those of the program; K is padded to a multiple
    of the lanes.
    """
    size = jnp.dtype(dtype).itemsize
    weights = heads * num_terms(dtype) * 2 * 4 * K * K
    # The forward kernel with all it can save: x, h, h before the step; c, n and m, and the gates.
    # Everything lies there twice: while one block is computed on, the next is on its way.
    step = heads * B * K * (4 * size + 2 * size + 3 * 4 + 4 * 4) + 4 * B * common.LANES
    carry = heads * B * K * 4 * 4 * 2
    # What a step computes before it is stored: gates, their gradients, and all terms of products.
    values = heads * B * K * 4 * 16 * num_terms(dtype)
    return weights + 2 * (steps * step + carry) + values


def time_block(T: int, fits: int) -> int:
    """Steps of one program, of the `fits` that have room.

    A divisor of T where one is at least half of what fits: then no step is padded, and no flags
    are needed to mask it. Otherwise the blocks are as equal as they can be and even.
    """
    fits = min(fits, T, MAX_STEPS)
    divisor = max(steps for steps in range(1, fits + 1) if T % steps == 0)
    if 2 * divisor >= fits:
        return divisor
    fits -= fits % 2
    return common.round_up(math.ceil(T / math.ceil(T / fits)), 2)


def widest(dtype: jnp.dtype, budget: int) -> int:
    """The largest K of a call that fits into `budget` bytes of VMEM, 0 if none does."""
    K = 0
    while vmem_bytes(ROWS, K + common.lanes(), dtype, 1) <= budget:
        K += common.lanes()
    return K


def blocks(B: int, T: int, H: int, K: int, dtype: jnp.dtype, budget: int) -> Blocks | None:
    """The division of a call, or None where a single row and step of one head exceed the budget.

    Heads of one program are tried from many to one, but for at least two programs where there are
    two heads: a chip of two cores (v4, v5p) gives each of them its share of the programs.
    """
    wanted = min(T, MAX_STEPS // 4)
    num_rows = common.round_up(B, ROWS)
    most = min(MAX_HEADS, max(1, H // 2))
    for heads in (heads for heads in range(most, 0, -1) if H % heads == 0):
        for parts in range(math.ceil(num_rows / MAX_ROWS), num_rows // ROWS + 1):
            rows = common.round_up(math.ceil(num_rows / parts), ROWS)
            empty, one = (vmem_bytes(rows, K, dtype, steps, heads=heads) for steps in (0, 1))
            fits = max(0, (budget - empty) // (one - empty))
            # Fewer steps than wanted only where there is nothing left to divide.
            if fits >= wanted or (fits and heads == 1 and rows == ROWS):
                steps = time_block(T, fits)
                padded = (common.round_up(B, rows), common.round_up(T, steps))
                return Blocks(heads, rows, steps, *padded)
    return None
