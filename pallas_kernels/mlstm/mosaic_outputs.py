"""h, dq, dk or dv of the mLSTM at all positions in parallel, by Mosaic GPU.

As `triton_kernels.outputs`, for Hopper: TMA copies, and products of warp groups (wgmma).

Source of the formulas: arXiv:2405.04517 and arXiv:2503.14376; the schedule is ours.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mlstm.mosaic_blocks import (
    BY_BLOCK,
    BY_COLUMN,
    SPLIT,
    Ring,
    block_at,
    by_warp_group,
    in_smem,
    launch,
    over_columns,
    over_rows,
    zeros_by_row,
)
from pallas_kernels.mlstm.mosaic_products import (
    Work,
    add_positions,
    add_state,
    gate,
    power_and_factor,
    weight,
)
from pallas_kernels.mlstm.mosaic_tiles import BLOCK
from pallas_kernels.mlstm.packing import NORMALIZER


class Sizes(NamedTuple):
    """Static sizes of a launch of `outputs`."""

    B: int
    T: int
    H: int
    A: int  # width of lhs and rhs
    W: int  # width of values
    L: int
    groups: int  # warp groups that multiply, each for 64 positions of the result
    blocks: int  # blocks of W of one program
    inner: int  # blocks of A in one slot
    slots: int
    later: bool  # sum over s >= t (t is a key); else over s <= t (t is a query)
    transposed: bool  # C is W x A
    normalize: bool
    sums: bool
    dnorm: bool  # add the cotangent of the normalizer to products of dh
    resets: bool
    eps: float
    interpret: Any

    @property
    def grid(self) -> tuple[int, ...]:
        """Programs along W, positions, heads and batch."""
        return (self.W // (BLOCK * self.blocks), self.T // (BLOCK * self.groups), self.H, self.B)

    @property
    def state_items(self) -> int:
        """Items of the ring for the product with C."""
        return self.A // BLOCK

    @property
    def rhs_items(self) -> int:
        """Items of the ring for the product with a block of rhs."""
        return self.A // (BLOCK * self.inner)

    def first_item(self, index: Any) -> Any:
        """The first item of the ring for the block of rhs and values with this number."""
        return self.state_items + index * (self.rhs_items + 1)

    def smem(self) -> "Smem":
        """Shared memory and barriers of a program."""
        width = max(self.A // BLOCK, self.blocks)
        return Smem(
            lhs=in_smem(self.groups, width, BLOCK, BLOCK),
            ring=in_smem(self.slots, max(self.blocks, self.inner), BLOCK, BLOCK),
            split=in_smem(self.slots if self.normalize else 1, SPLIT, BLOCK),
            columns=plgpu.SMEM((self.slots, 4, BLOCK), jnp.float32),
            left=in_smem(self.groups, BLOCK if self.interpret else SPLIT, BLOCK),
            has_lhs=plgpu.Barrier(num_arrivals=self.A // BLOCK, num_barriers=self.groups),
            has_primal=plgpu.Barrier(num_arrivals=self.blocks, num_barriers=self.groups),
            has_state=plgpu.Barrier(
                num_arrivals=self.blocks + self.normalize, num_barriers=self.slots
            ),
            has_rhs=plgpu.Barrier(num_arrivals=self.inner + 1, num_barriers=self.slots),
            has_values=plgpu.Barrier(num_arrivals=self.blocks, num_barriers=self.slots),
            empty=plgpu.Barrier(num_arrivals=self.groups, num_barriers=self.slots),
        )


class Smem(NamedTuple):
    """Shared memory and barriers of `outputs`."""

    lhs: Any  # groups blocks 64 64: positions x A; at the end the result
    ring: Any  # slots blocks 64 64: blocks of C, rhs or values
    split: Any  # slots 8 64
    columns: Any  # slots 4 64
    left: Any  # groups 64 64; for the interpreter, which takes operands from shared memory only
    has_lhs: Any
    has_primal: Any
    has_state: Any
    has_rhs: Any
    has_values: Any
    empty: Any


class Gmem(NamedTuple):
    """Arguments and results of `outputs`, in global memory."""

    gates: Any  # B H 8 T, of `packing.PackedGates`
    columns: Any  # B H 4 T, gates of s: coarse, key or query, normalizer, segment
    lhs: Any  # B T HA
    rhs: Any  # B T HA
    values: Any  # B T HW
    C: Any  # B H N K V, states at chunk boundaries, or their cotangents
    n: Any  # B H N 1 K
    split: Any  # B H N 8 K, bfloat16: n as sums; read if NORMALIZE
    primal: Any  # B T HW: the array whose cotangent is the result; read for sums
    out: Any  # B T HW
    sums: Any  # B H W/width T: q n if normalized, else sums of primal * out over columns


class Program(NamedTuple):
    """What a program computes."""

    b: Any
    h: Any
    chunk: Any
    first: Any  # block of positions in the chunk, the first one of the program
    w: Any  # first block of columns, in W


def _outputs_body(s: Sizes, *refs: Any) -> None:
    """64 positions per warp group of one head's result."""
    x = Gmem(*refs[: len(Gmem._fields)])
    smem = Smem(*refs[len(Gmem._fields) :])
    position = lax.axis_index("t") * s.groups
    program = Program(
        lax.axis_index("batch"),
        lax.axis_index("head"),
        lax.div(position, s.L // BLOCK),
        lax.rem(position, s.L // BLOCK),
        lax.axis_index("w") * s.blocks,
    )
    by_warp_group(
        s.groups,
        lambda: _copy(s, x, smem, program),
        lambda group: _multiply(s, x, smem, program, group),
    )


def _other_blocks(s: Sizes, program: Program) -> tuple[Any, Any]:
    """The first block of other positions, and their number, for all groups of a program."""
    if s.later:
        return program.first, s.L // BLOCK - program.first
    return jnp.int32(0), program.first + s.groups


def _copy(s: Sizes, x: Gmem, smem: Smem, program: Program) -> None:
    """Fills the ring with the blocks of C, then with those of rhs and values by position."""
    b, h, chunk, _, w = program
    ring = Ring(s.slots, smem.empty)
    a = h * (s.A // BLOCK)

    @pl.loop(0, s.state_items)
    def _(item):
        ring.wait_until_empty(item)
        slot = ring.slot(item)
        full = smem.has_state.at[slot]
        for j in range(s.blocks):
            k, v = block_at(item), block_at(w + j)
            if s.transposed:
                k, v = v, k
            plgpu.copy_gmem_to_smem(x.C.at[b, h, chunk, k, v], smem.ring.at[slot, j], full)
        if s.normalize:
            split = x.split.at[b, h, chunk, :, block_at(item)]
            plgpu.copy_gmem_to_smem(split, smem.split.at[slot], full)

    begin, count = _other_blocks(s, program)

    @pl.loop(0, count)
    def _(index):
        t = block_at(chunk * (s.L // BLOCK) + begin + index)
        item = s.first_item(index)

        @pl.loop(0, s.rhs_items)
        def _(r):
            ring.wait_until_empty(item + r)
            slot = ring.slot(item + r)
            full = smem.has_rhs.at[slot]
            for i in range(s.inner):
                columns = block_at(a + r * s.inner + i)
                plgpu.copy_gmem_to_smem(x.rhs.at[b, t, columns], smem.ring.at[slot, i], full)
            plgpu.copy_gmem_to_smem(x.columns.at[b, h, :, t], smem.columns.at[slot], full)

        item = item + s.rhs_items
        ring.wait_until_empty(item)
        slot = ring.slot(item)
        for j in range(s.blocks):
            columns = block_at(h * (s.W // BLOCK) + w + j)
            source = x.values.at[b, t, columns]
            plgpu.copy_gmem_to_smem(source, smem.ring.at[slot, j], smem.has_values.at[slot])


def _multiply(s: Sizes, x: Gmem, smem: Smem, program: Program, group: Any) -> None:
    """Computes 64 positions, from C and from the positions of the same chunk."""
    t = block_at(program.chunk * (s.L // BLOCK) + program.first + group)
    work = Work(s, x, smem, program, group, t, Ring(s.slots, smem.empty), smem.lhs.at[group])
    for i in range(s.A // BLOCK):
        source = x.lhs.at[program.b, t, block_at(program.h * (s.A // BLOCK) + i)]
        plgpu.copy_gmem_to_smem(source, work.lhs.at[i], smem.has_lhs.at[group])
    plgpu.barrier_wait(smem.has_lhs.at[group])

    def products(acc, *column):
        add_state(work, acc, column)
        d = add_positions(work, acc, _other_blocks(s, program))
        if s.normalize:
            weights = weight(work)
            _, factor = power_and_factor(weights)
            d = factor * d + weights * jnp.sum(column[0][...], axis=1)
        return acc[...], d

    shapes = [plgpu.WGMMAAccumulatorRef((BLOCK, BLOCK * s.blocks))]
    shapes += [plgpu.WGMMAAccumulatorRef((BLOCK, SPLIT))] if s.normalize else []
    _store(work, *pl.run_scoped(products, *shapes))


def _store(work: Work, acc, d) -> None:
    """Adds the contribution of n, normalizes, and stores the result and its sums."""
    s, x, smem, (b, h, chunk, _, w), group, t, _, lhs = work
    columns = [block_at(h * (s.W // BLOCK) + w + j) for j in range(s.blocks)]
    has_primal = s.sums and not s.normalize
    if has_primal:
        d = zeros_by_row()
        for j in range(s.blocks):
            source = x.primal.at[b, t, columns[j]]
            plgpu.copy_gmem_to_smem(source, lhs.at[j], smem.has_primal.at[group])
        plgpu.barrier_wait(smem.has_primal.at[group])
    weights = weight(work)
    _, factor = power_and_factor(weights)
    for j in range(s.blocks):  # one after the other, as registers are scarce
        block = acc[:, j * BLOCK : (j + 1) * BLOCK] * over_columns(factor)
        if s.transposed and (s.later or s.dnorm):
            n = plgpu.load(
                x.n.at[b, h, chunk, 0, block_at(w + j)], layout=BY_COLUMN, optimized=False
            )
            of_n = weights if s.later else weights * gate(work, NORMALIZER)
            block += over_columns(of_n) * over_rows(n)
        if s.normalize:
            norm = jnp.maximum(jnp.abs(d), gate(work, NORMALIZER)) + s.eps
            block *= over_columns(1.0 / norm)
        if has_primal:
            primal = plgpu.load(lhs.at[j], layout=BY_BLOCK).astype(jnp.float32)
            d += jnp.sum(primal * block, axis=1)
        lhs[j] = block.astype(jnp.bfloat16)
    if s.sums:
        x.sums[b, h, lax.axis_index("w"), t] = d
    plgpu.commit_smem()
    for j in range(s.blocks):
        plgpu.copy_smem_to_gmem(lhs.at[j], x.out.at[b, t, columns[j]])
    plgpu.wait_smem_to_gmem(0)


def outputs(s: Sizes, arrays: tuple[jax.Array, ...], *, name: str) -> Any:
    """Launches `_outputs_body` on the first fields of `Gmem`; returns the others."""
    out_type = (
        jax.ShapeDtypeStruct((s.B, s.T, s.H * s.W), jnp.bfloat16),
        jax.ShapeDtypeStruct((s.B, s.H, s.grid[0], s.T), jnp.float32),
    )
    names = ("w", "t", "head", "batch")
    return launch(_outputs_body, s, names, kernel_name=name, out_type=out_type)(*arrays)
