"""States of the mLSTM at chunk boundaries, or their cotangents, by Mosaic GPU.

As `triton_kernels.states`, for Hopper: TMA copies, and products of warp groups (wgmma), which are
added to the state in registers, chunk by chunk.

Source of the formulas: arXiv:2405.04517 and arXiv:2503.14376; the schedule is ours.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mlstm.mosaic_blocks import (
    BY_BLOCK,
    BY_ROW,
    SPLIT,
    Ring,
    block_at,
    by_warp_group,
    in_smem,
    launch,
    over_columns,
    zeros_by_row,
)
from pallas_kernels.mlstm.mosaic_tiles import BLOCK
from pallas_kernels.mlstm.packing import DECAY, READ, WRITE


class Sizes(NamedTuple):
    """Static sizes of a launch of `states`."""

    B: int
    T: int
    H: int
    K: int
    V: int
    L: int
    groups: int  # warp groups that multiply, each for 64 rows of the state
    blocks: int  # blocks of V of one program
    slots: int
    reversed: bool  # cotangents, from the last chunk to the first
    interpret: Any

    @property
    def grid(self) -> tuple[int, ...]:
        """Programs along K, V, heads and batch."""
        return (self.K // (BLOCK * self.groups), self.V // (BLOCK * self.blocks), self.H, self.B)

    def smem(self) -> "Smem":
        """Shared memory and barriers of a program."""
        return Smem(
            lhs=in_smem(self.slots, self.groups, BLOCK, BLOCK),
            rhs=in_smem(self.slots, self.blocks, BLOCK, BLOCK),
            weights=plgpu.SMEM((self.slots, BLOCK), jnp.float32),
            split=in_smem(self.slots, SPLIT, BLOCK),
            weighted=in_smem(self.groups, BLOCK, BLOCK),
            stage=in_smem(self.groups, self.blocks, BLOCK, BLOCK),
            full=plgpu.Barrier(num_arrivals=self.groups + self.blocks + 2, num_barriers=self.slots),
            empty=plgpu.Barrier(num_arrivals=self.groups, num_barriers=self.slots),
            staged=plgpu.Barrier(num_arrivals=self.blocks, num_barriers=self.groups),
        )


class Smem(NamedTuple):
    """Shared memory and barriers of `states`."""

    lhs: Any  # slots groups 64 64: positions x K
    rhs: Any  # slots blocks 64 64: positions x V
    weights: Any  # slots 64
    split: Any  # slots 8 64: the weights of n, as sums of bfloat16
    weighted: Any  # groups 64 64: weights * lhs
    stage: Any  # groups blocks 64 64: C on its way to or from global memory
    full: Any
    empty: Any
    staged: Any


class Gmem(NamedTuple):
    """Arguments and results of `states`, in global memory."""

    gates: Any  # B H 8 T, of `packing.PackedGates`
    split: Any  # B H 8 T, bfloat16: the weights of n
    lhs: Any  # B T HK
    rhs: Any  # B T HV
    C_first: Any  # B H K V, float32: the state before the first chunk in order
    n_first: Any  # B H 1 K
    C_starts: Any  # B H N K V, of the forward pass; read if reversed
    C_out: Any  # B H N K V: the state before each chunk in order
    n_out: Any  # B H N 1 K
    C_last: Any  # B H K V, float32: the state after the last chunk in order
    n_last: Any  # B H 1 K
    scaling: Any  # B H N V/width K: sums of dC * C_starts over V; written if reversed


def _states_body(s: Sizes, *refs: Any) -> None:
    """A block of rows and columns of one head's state, carried in registers through all chunks."""
    x = Gmem(*refs[: len(Gmem._fields)])
    smem = Smem(*refs[len(Gmem._fields) :])
    by_warp_group(s.groups, lambda: _copy(s, x, smem), lambda group: _multiply(s, x, smem, group))


def _copy(s: Sizes, x: Gmem, smem: Smem) -> None:
    """Copies the operands of one position block after the other."""
    b, h = lax.axis_index("batch"), lax.axis_index("head")
    k = (h * s.K + lax.axis_index("k") * s.groups * BLOCK) // BLOCK
    v = (h * s.V + lax.axis_index("v") * s.blocks * BLOCK) // BLOCK
    ring = Ring(s.slots, smem.empty)
    steps = s.T // BLOCK

    @pl.loop(0, steps)
    def _(step):
        ring.wait_until_empty(step)
        slot, t = ring.slot(step), block_at(steps - 1 - step if s.reversed else step)
        full = smem.full.at[slot]
        for i in range(s.groups):
            plgpu.copy_gmem_to_smem(x.lhs.at[b, t, block_at(k + i)], smem.lhs.at[slot, i], full)
        for j in range(s.blocks):
            plgpu.copy_gmem_to_smem(x.rhs.at[b, t, block_at(v + j)], smem.rhs.at[slot, j], full)
        gate = READ if s.reversed else WRITE
        plgpu.copy_gmem_to_smem(x.gates.at[b, h, gate, t], smem.weights.at[slot], full)
        plgpu.copy_gmem_to_smem(x.split.at[b, h, :, t], smem.split.at[slot], full)


class Work(NamedTuple):
    """What a warp group computes, and with what."""

    s: Sizes
    x: Gmem
    smem: Smem
    b: Any
    h: Any
    k: Any  # its block of K
    v: Any  # first block of columns of the program
    group: Any

    @property
    def owns_n(self) -> Any:
        """Whether the program sums n, which has no columns."""
        return lax.axis_index("v") == 0

    def part(self, array: Any, *index: Any) -> list[Any]:
        """The blocks of the program in one of the states, `B H ... K V`, in global memory."""
        columns = [block_at(self.v + j) for j in range(self.s.blocks)]
        return [array.at[self.b, self.h, *index, self.k, column] for column in columns]


def _multiply(s: Sizes, x: Gmem, smem: Smem, group: Any) -> None:
    """Carries 64 rows of the state through all chunks."""
    k, v = lax.axis_index("k") * s.groups + group, lax.axis_index("v") * s.blocks
    work = Work(s, x, smem, lax.axis_index("batch"), lax.axis_index("head"), block_at(k), v, group)
    b, h, k = work.b, work.h, work.k
    N = s.T // s.L

    def one_chunk(index, carry):
        C, n = carry
        chunk = N - 1 - index if s.reversed else index
        _store(work, C, chunk)

        @pl.when(work.owns_n)
        def _():
            x.n_out[b, h, chunk, 0, k] = n

        shapes = [plgpu.WGMMAAccumulatorRef((BLOCK, BLOCK))] * s.blocks + [
            plgpu.WGMMAAccumulatorRef((BLOCK, SPLIT))
        ]
        *added, column = pl.run_scoped(functools.partial(_add_chunk, work, index), *shapes)
        decay = x.gates[b, h, DECAY, chunk * s.L]
        C = [decay * block + more for block, more in zip(C, added, strict=True)]
        if s.reversed:
            _sum_scaling(work, C, chunk)
        return C, decay * n + jnp.sum(column, axis=1)

    C = [plgpu.load(c, layout=BY_BLOCK, optimized=False) for c in work.part(x.C_first)]
    n = plgpu.load(x.n_first.at[b, h, 0, k], layout=BY_ROW, optimized=False)
    C, n = lax.fori_loop(0, N, one_chunk, (C, n))
    for block, target in zip(C, work.part(x.C_last), strict=True):
        target[...] = block

    @pl.when(work.owns_n)
    def _():
        x.n_last[b, h, 0, k] = n

    plgpu.wait_smem_to_gmem(0)


def _store(work: Work, C: list[Any], chunk: Any) -> None:
    """Starts to copy C before a chunk to global memory."""
    stage = work.smem.stage.at[work.group]
    plgpu.wait_smem_to_gmem(0)  # the copy of the previous chunk has ended
    for j, block in enumerate(C):
        stage[j] = block.astype(jnp.bfloat16)
    plgpu.commit_smem()
    for j, target in enumerate(work.part(work.x.C_out, chunk)):
        plgpu.copy_smem_to_gmem(stage.at[j], target)


def _add_chunk(work: Work, index: Any, *accumulators: Any) -> list[Any]:
    """What the chunk with this number in order adds to C and, as columns of a sum, to n."""
    s, smem, group = work.s, work.smem, work.group
    ring, steps = Ring(s.slots, smem.empty), s.L // BLOCK
    *blocks, column = accumulators

    @pl.loop(0, steps)
    def _(i):
        step = index * steps + i
        slot = ring.slot(step)
        plgpu.barrier_wait(smem.full.at[slot])
        weights = plgpu.load(smem.weights.at[slot], layout=BY_ROW)
        lhs = plgpu.load(smem.lhs.at[slot, group], layout=BY_BLOCK).astype(jnp.float32)
        smem.weighted[group] = (lhs * over_columns(weights)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        weighted = smem.weighted.at[group].transpose((1, 0))
        for j, block in enumerate(blocks):
            plgpu.wgmma(block, weighted, smem.rhs.at[slot, j])

        @pl.when(work.owns_n)
        def _():
            split = smem.split.at[slot].transpose((1, 0))
            plgpu.wgmma(column, smem.lhs.at[slot, group].transpose((1, 0)), split)

        plgpu.wgmma_wait(0)
        ring.release(step)

    return [accumulator[...] for accumulator in accumulators]


def _sum_scaling(work: Work, dC: list[Any], chunk: Any) -> None:
    """Sums of dC * C over V at the start of a chunk."""
    staged, stage = work.smem.staged.at[work.group], work.smem.stage.at[work.group]
    plgpu.wait_smem_to_gmem(0)
    for j, source in enumerate(work.part(work.x.C_starts, chunk)):
        plgpu.copy_gmem_to_smem(source, stage.at[j], staged)
    plgpu.barrier_wait(staged)
    total = zeros_by_row()
    for j, block in enumerate(dC):
        C = plgpu.load(stage.at[j], layout=BY_BLOCK).astype(jnp.float32)
        total += jnp.sum(C * block, axis=1)
    work.x.scaling[work.b, work.h, chunk, lax.axis_index("v"), work.k] = total


def states(s: Sizes, arrays: tuple[jax.Array, ...], *, name: str) -> Any:
    """Launches `_states_body` on the first fields of `Gmem`; returns the others."""
    N, shape = s.T // s.L, jax.ShapeDtypeStruct
    out_type = (
        shape((s.B, s.H, N, s.K, s.V), jnp.bfloat16),
        shape((s.B, s.H, N, 1, s.K), jnp.float32),
        shape((s.B, s.H, s.K, s.V), jnp.float32),
        shape((s.B, s.H, 1, s.K), jnp.float32),
        shape((s.B, s.H, N, s.grid[1], s.K), jnp.float32),
    )
    names = ("k", "v", "head", "batch")
    return launch(_states_body, s, names, kernel_name=name, out_type=out_type)(*arrays)
