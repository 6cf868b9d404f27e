"""What of a call is on the chip at once: heads, rows of the batch and steps of one program."""

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.slstm import packed

ROWS = 8
"""Batches are filled up to a multiple of the rows of a tile (in bfloat16 half a tile will do)."""

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
    rows: int  # of the batch, filled up, of one program
    steps: int  # of one program
    num_rows: int  # rows of the whole batch, filled up
    num_steps: int  # steps of the whole sequence, filled up

    @property
    def unroll(self) -> int:
        """Steps in the body of the loop: two chains of few heads overlap a little."""
        return 2 if self.heads <= 2 and self.steps % 2 == 0 else 1


def vmem_bytes(B: int, K: int, dtype: jnp.dtype, steps: int, *, heads: int = 1) -> int:
    """VMEM that one program needs, of the kernel that needs most of it.

    Args:
        B: rows of one program, a multiple of `ROWS`.
        K: width of a head, filled up to a multiple of the lanes.
        dtype: of x.
        steps: steps of one program.
        heads: heads of one program.
    """
    size = jnp.dtype(dtype).itemsize
    weights = heads * packed.num_terms(dtype) * 2 * 4 * K * K
    # The forward kernel with all it can save: x, h, h before the step; c, n and m, and the gates.
    # Everything lies there twice: while one block is computed on, the next is on its way.
    step = heads * B * K * (4 * size + 2 * size + 3 * 4 + 4 * 4) + 4 * B * common.LANES
    carry = heads * B * K * 4 * 4 * 2
    # What a step computes before it is stored: gates, their gradients, and all terms of products.
    values = heads * B * K * 4 * 16 * packed.num_terms(dtype)
    return weights + 2 * (steps * step + carry) + values


def time_block(T: int, fits: int) -> int:
    """Steps of one program, of the `fits` that have room.

    A divisor of T where one is at least half of what fits: then no step is filled up, and no flags
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
    """The division of a call, or None where a single row and step of one head do not fit.

    Args:
        B, T, H: batch, steps and heads of the call.
        K: width of a head, filled up to a multiple of the lanes.
        dtype: of x.
        budget: bytes of VMEM.
    """

    def fitting(rows: int, heads: int) -> int:
        """Steps that fit, or 0."""
        empty, one = (vmem_bytes(rows, K, dtype, steps, heads=heads) for steps in (0, 1))
        return max(0, (budget - empty) // (one - empty))

    wanted = min(T, MAX_STEPS // 4)
    num_rows = common.round_up(B, ROWS)
    for heads in _divisors(H):
        for parts in range(math.ceil(num_rows / MAX_ROWS), num_rows // ROWS + 1):
            rows = common.round_up(math.ceil(num_rows / parts), ROWS)
            fits = fitting(rows, heads)
            # Fewer steps than wanted only where there is nothing left to divide.
            if fits >= wanted or (fits and heads == 1 and rows == ROWS):
                steps = time_block(T, fits)
                filled = (common.round_up(B, rows), common.round_up(T, steps))
                return Blocks(heads, rows, steps, *filled)
    return None


def _divisors(H: int) -> list[int]:
    """Heads of one program to try, many first; at least two programs where there are two heads.

    A chip of two cores (v4, v5p) gives each of them its share of the programs.
    """
    most = min(MAX_HEADS, max(1, H // 2))
    return [heads for heads in range(most, 0, -1) if H % heads == 0]
