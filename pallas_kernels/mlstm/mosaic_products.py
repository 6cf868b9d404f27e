"""The products of `mosaic_outputs`: what one warp group adds to its 64 positions."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import NEG
from pallas_kernels.mlstm.mosaic_blocks import (
    BY_BLOCK,
    BY_COLUMN,
    BY_ROW,
    Ring,
    block_at,
    over_columns,
    over_rows,
    zeros_by_row,
)
from pallas_kernels.mlstm.mosaic_tiles import BLOCK
from pallas_kernels.mlstm.packing import COARSE, KEY, NORMALIZER, QUERY, READ, SEGMENT, WRITE


class Work(NamedTuple):
    """What a warp group computes, and with what."""

    sizes: Any  # `mosaic_outputs.Sizes`
    gmem: Any  # `mosaic_outputs.Gmem`
    smem: Any  # `mosaic_outputs.Smem`
    program: Any  # `mosaic_outputs.Program`
    group: Any  # number of the warp group
    t: Any  # its positions
    ring: Ring
    lhs: Any  # blocks of its positions, in shared memory


def gate(work: Work, index: int) -> Any:
    """The gate with this index in `packing.PackedGates` at the positions of a warp group, `64`."""
    b, h, *_ = work.program
    return plgpu.load(work.gmem.gates.at[b, h, index, work.t], layout=BY_ROW, optimized=False)


def weight(work: Work) -> Any:
    """The weight of C at the positions of a warp group, `64`."""
    return gate(work, WRITE if work.sizes.later else READ)


def power_and_factor(weights: Any) -> tuple[Any, Any]:
    """Weights as the product of a power of two, 0 for 0, and a factor of at least 1 and below 2.

    bfloat16 numbers times the power are exact. The factor multiplies sums in float32 at the end.
    """
    exponent = lax.bitcast_convert_type(weights, jnp.int32) & 0x7F800000
    power = lax.bitcast_convert_type(exponent, jnp.float32)
    return power, jnp.where(power > 0, weights / power, 1.0)


class QueryGates(NamedTuple):
    """Gates of the positions of a warp group, `64` each, which all positions s need."""

    coarse: Any
    fine: Any
    dnorm: Any  # None if not used
    segment: Any  # None if not used


def add_state(work: Work, acc: Any, column: tuple[Any, ...]) -> None:
    """Adds the product of lhs with C to `acc`, and that with n to `column`.

    `acc` is to be multiplied by the factor of the weights, and `column` by the weights.
    """
    s, smem = work.sizes, work.smem
    power, _ = power_and_factor(weight(work))

    @pl.loop(0, s.state_items)
    def _(item):
        slot = work.ring.slot(item)
        block = plgpu.load(work.lhs.at[item], layout=BY_BLOCK).astype(jnp.float32)
        block = (block * over_columns(power)).astype(jnp.bfloat16)
        plgpu.barrier_wait(smem.has_state.at[slot])
        C = [smem.ring.at[slot, j] for j in range(s.blocks)]
        C = [part.transpose((1, 0)) for part in C] if s.transposed else C
        for sums in column:
            plgpu.wgmma(sums, work.lhs.at[item], smem.split.at[slot].transpose((1, 0)))
        _multiply(work, _blocks_of(work, acc), block, C)
        work.ring.release(item)


def add_positions(work: Work, acc: Any, others: tuple[Any, Any]) -> Any:
    """Adds the contributions of positions of the same chunk to `acc`, divided by its factor.

    Returns their sums over s, divided as well, if these normalize the result, else None.

    Args:
        others: the first block of positions s, and the number of them, of all groups.
    """
    s, program, group = work.sizes, work.program, work.group
    count = others[1]
    _, factor = power_and_factor(weight(work))
    own = QueryGates(
        gate(work, COARSE),
        gate(work, KEY if s.later else QUERY) - jnp.log(factor),
        gate(work, NORMALIZER) if s.dnorm and not s.later else None,
        gate(work, SEGMENT) if s.resets else None,
    )

    def skip(index, _):
        # Waits, as releasing a slot before it is full would count for its previous item.
        for r in range(s.rhs_items + 1):
            item = s.first_item(index) + r
            full = work.smem.has_rhs if r < s.rhs_items else work.smem.has_values
            plgpu.barrier_wait(full.at[work.ring.slot(item)])
            work.ring.release(item)

    def add(index, d, *, is_diagonal=False):
        P = _weights(work, own, s.first_item(index), is_diagonal=is_diagonal)
        d = d + jnp.sum(P, axis=1) if s.normalize else d
        item = s.first_item(index) + s.rhs_items
        slot = work.ring.slot(item)
        plgpu.barrier_wait(work.smem.has_values.at[slot])
        values = [work.smem.ring.at[slot, j] for j in range(s.blocks)]
        _multiply(work, _blocks_of(work, acc), P.astype(jnp.bfloat16), values)
        work.ring.release(item)
        return d

    d = zeros_by_row() if s.normalize else None
    # The block of the own positions is apart: the order of positions matters in it only, and a mask
    # in the loop would take registers. A program ends, or begins if later, with blocks that some of
    # its groups do not see.
    if s.later:
        lax.fori_loop(0, group, skip, None)
        return lax.fori_loop(group + 1, count, add, add(group, d, is_diagonal=True))
    diagonal = program.first + group
    d = add(diagonal, lax.fori_loop(0, diagonal, add, d), is_diagonal=True)
    lax.fori_loop(diagonal + 1, count, skip, None)
    return d


def _weights(work: Work, own: QueryGates, item: Any, *, is_diagonal: bool) -> Any:
    """The products of lhs and 64 positions s of rhs, from `item` on, times their gates."""
    s, smem, ring = work.sizes, work.smem, work.ring

    def product(P):
        # Loops, as unrolled code would store the addresses of all blocks of lhs in registers.
        @pl.loop(0, s.rhs_items)
        def _(r):
            slot = ring.slot(item + r)
            plgpu.barrier_wait(smem.has_rhs.at[slot])

            @pl.loop(0, s.inner)
            def _(i):
                rhs = smem.ring.at[slot, i].transpose((1, 0))
                plgpu.wgmma(P, work.lhs.at[r * s.inner + i], rhs)

            plgpu.wgmma_wait(0)
            pl.when(r < s.rhs_items - 1)(lambda: ring.release(item + r))

        return P[...]

    P = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((BLOCK, BLOCK)))
    last = item + s.rhs_items - 1
    P = _gated(s, P, own, smem.columns.at[ring.slot(last)], is_diagonal=is_diagonal)
    plgpu.commit_smem()  # orders loads of columns before the next copy to the slot
    ring.release(last)
    return P


def _gated(s: Any, P: Any, own: QueryGates, columns: Any, *, is_diagonal: bool) -> Any:
    """The products P of 64 positions t and 64 positions s, times their gates."""

    def column(index):
        return over_rows(plgpu.load(columns.at[index], layout=BY_COLUMN))

    log_weight = over_columns(own.coarse) - column(0)
    log_weight = -log_weight if s.later else log_weight
    log_weight += over_columns(own.fine) + column(1)
    if is_diagonal:
        t, other = (
            plgpu.broadcasted_iota(jnp.int32, P.shape, axis, layout=BY_BLOCK) for axis in (0, 1)
        )
        log_weight = jnp.where(t <= other if s.later else t >= other, log_weight, NEG)
    if s.resets:
        is_same = over_columns(own.segment) == column(3)
        log_weight = jnp.where(is_same, log_weight, NEG)
    if s.dnorm:
        P += column(2) if s.later else over_columns(own.dnorm)
    return P * jnp.exp(log_weight)


def _blocks_of(work: Work, acc: Any) -> list[Any]:
    return [acc.at[:, block_at(j)] for j in range(work.sizes.blocks)]


def _multiply(work: Work, accumulators: list[Any], left: Any, right: list[Any]) -> None:
    """Adds the products of a block in registers and blocks in shared memory to accumulators."""
    if work.sizes.interpret:  # the interpreter takes operands from shared memory only
        work.smem.left[work.group] = left
        plgpu.commit_smem()
        left = work.smem.left.at[work.group]
    for accumulator, block in zip(accumulators, right, strict=True):
        plgpu.wgmma(accumulator, left, block)
    plgpu.wgmma_wait(0)
