"""Block sizes of the sLSTM TPU kernels: heads, sequences and steps of a program that fit VMEM."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.hardware import MIB, TPUS
from pallas_kernels.tpu import SCOPED_BYTES, current_chip, num_terms

SUBLANES = 8
"""Batches are padded to a multiple of the sublanes of a float32 tile; bfloat16 uses half a tile."""

MAX_SEQUENCES = 64
"""Sequences per program; with more, the operands of a step no longer stay near the registers."""

MAX_HEADS = 4
"""Heads per program; the work of other heads hides the latency of the matrix unit."""

MAX_STEPS = 32
"""Steps per program; enough to amortize the cost of starting one."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a call is divided among programs."""

    heads: int  # per program
    sequences: int  # per program
    steps: int  # per program
    padded_batch: int
    padded_steps: int  # of the sequence

    @property
    def unroll(self) -> int:
        """Steps in the loop body; with few heads, two consecutive steps overlap a little."""
        return 2 if self.heads <= 2 and self.steps % 2 == 0 else 1


class Tile(NamedTuple):
    """Static sizes of a call."""

    blocks: Blocks
    heads: int  # narrow heads that share the lanes of one wide head
    width: int  # of the wide head, a multiple of the lanes
    vmem_bytes: int  # VMEM limit of the kernels


def choose(B: int, T: int, H: int, K: int, dtype: jnp.dtype) -> Tile:
    """The tile of a call on the current chip; raises ValueError with the message of `refusal`."""
    if reason := refusal(K, dtype):
        raise ValueError(f"slstm: {reason}.")
    max_heads = min(H, max(1, common.lanes() // K))
    heads = max(heads for heads in range(1, max_heads + 1) if H % heads == 0)
    width, budget = common.round_up(heads * K, common.lanes()), vmem_limit()
    call_blocks = blocks(B, T, H // heads, width, dtype, budget)
    assert call_blocks is not None  # guaranteed by `refusal`
    return Tile(call_blocks, heads, width, budget)


def refusal(K: int, dtype: jnp.dtype, chip: str | None = None) -> str | None:
    """Why no kernel supports heads of width K, with a supported width, or None."""
    if reason := common.dtype_refusal(jnp.dtype(dtype)):
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
    """Whether the decoding kernel fits VMEM: the state of all heads and the weights of two."""
    B, H, K = (x.shape[axis] for axis in (0, 3, 4))
    B, H = (common.round_up(size, SUBLANES) for size in (B, H))
    K = common.round_up(K, common.lanes())
    weights = 2 * 4 * K * K * r.dtype.itemsize
    converted = 4 * K * K * x.dtype.itemsize
    needed = weights + converted + 2 * 2 * 4 * B * H * K * 4 + B * K * 4 * (2 * 4 + 16)
    return needed <= tile.vmem_bytes


def vmem_limit(chip: str | None = None) -> int:
    """Bytes of VMEM that a kernel may use: all of a small VMEM, half of a large one."""
    chip = chip or current_chip()
    if common.interpreter() or chip is None:
        return SCOPED_BYTES
    return max(SCOPED_BYTES, TPUS[chip].vmem_bytes // 2)


def vmem_bytes(B: int, K: int, dtype: jnp.dtype, steps: int, *, heads: int = 1) -> int:
    """Bytes of VMEM that one program of the largest kernel needs.

    B (a multiple of `SUBLANES`), `steps` and `heads` are per program; K is padded to a multiple of
    the lanes.
    """
    size = jnp.dtype(dtype).itemsize
    weights = heads * num_terms(dtype) * 2 * 4 * K * K
    # The forward kernel with all residuals: x, h, h before the step; c, n and m, and the gates.
    # Blocks are double-buffered: the DMA of the next one overlaps with computing the current one.
    step = heads * B * K * (4 * size + 2 * size + 3 * 4 + 4 * 4) + 4 * B * common.LANES
    carry = heads * B * K * 4 * 4 * 2
    # Intermediates of a step: gates, their gradients, and all terms of products.
    values = heads * B * K * 4 * 16 * num_terms(dtype)
    return weights + 2 * (steps * step + carry) + values


def time_block(T: int, max_steps: int) -> int:
    """Steps per program, at most the `max_steps` that fit VMEM.

    A divisor of T if one is at least half of `max_steps`: then no step is padded, and no flags are
    needed to mask padding. Otherwise an even number that makes the blocks as equal as possible.
    """
    max_steps = min(max_steps, T, MAX_STEPS)
    divisor = max(steps for steps in range(1, max_steps + 1) if T % steps == 0)
    if 2 * divisor >= max_steps:
        return divisor
    max_steps -= max_steps % 2
    return common.round_up(math.ceil(T / math.ceil(T / max_steps)), 2)


def widest(dtype: jnp.dtype, budget: int) -> int:
    """The largest K of a call that fits `budget` bytes of VMEM, 0 if none does."""
    K = 0
    while vmem_bytes(SUBLANES, K + common.lanes(), dtype, 1) <= budget:
        K += common.lanes()
    return K


def blocks(B: int, T: int, H: int, K: int, dtype: jnp.dtype, budget: int) -> Blocks | None:
    """The blocks of a call, or None if one step of one head and `SUBLANES` sequences exceeds VMEM.

    Prefers many heads per program, but leaves at least two programs for two or more heads: a chip
    with two cores (v4, v5p) splits the programs between them.
    """
    min_steps = min(T, MAX_STEPS // 4)
    batch = common.round_up(B, SUBLANES)
    max_heads = min(MAX_HEADS, max(1, H // 2))
    for heads in (heads for heads in range(max_heads, 0, -1) if H % heads == 0):
        for parts in range(math.ceil(batch / MAX_SEQUENCES), batch // SUBLANES + 1):
            sequences = common.round_up(math.ceil(batch / parts), SUBLANES)
            # The size is linear in the steps, so two points give the largest number that fits.
            empty, one = (vmem_bytes(sequences, K, dtype, steps, heads=heads) for steps in (0, 1))
            max_steps = max(0, (budget - empty) // (one - empty))
            # Fewer than `min_steps` are accepted only for the smallest block of heads and batch.
            if max_steps >= min_steps or (max_steps and heads == 1 and sequences == SUBLANES):
                steps = time_block(T, max_steps)
                padded = (common.round_up(B, sequences), common.round_up(T, steps))
                return Blocks(heads, sequences, steps, *padded)
    return None
