"""Shared by the Mosaic GPU kernels of the mLSTM: blocks, the ring of slots, and the launch.

Tiles are made of blocks of 64 x 64. The last warp group of a program copies blocks into a ring of
slots in shared memory; the others multiply them, each for 64 rows of the result. A slot has two
barriers: one completes when it is full, the other when all of these groups have released it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mlstm.mosaic_tiles import BLOCK

SPLIT = 8
"""Terms of `mosaic_calls.split`, padded to the smallest N of wgmma."""

THREAD = "warp_group"

COPY_REGISTERS, MULTIPLY_REGISTERS = 40, 232
"""Per thread, of the warp groups; 168 each at the start if two multiply."""

BY_BLOCK = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = BY_BLOCK.reduce(1), BY_BLOCK.reduce(0)
"""Layouts in registers of a block, of a value per row, and of a value per column."""


def in_smem(*shape: int) -> Any:
    """Blocks in shared memory, in the layout that wgmma reads."""
    # pyright takes both for abstract classes.
    tiling: Any = plgpu.TilingTransform((8, BLOCK))  # pyright: ignore[reportAbstractUsage]
    swizzle: Any = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    transforms = (tiling, swizzle)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def block_at(index: Any) -> Any:
    """The positions or columns of a block."""
    return pl.ds(index * BLOCK, BLOCK)


def over_columns(x: jax.Array) -> jax.Array:
    """A value per row, at every column of a block."""
    return lax.broadcast_in_dim(x, (BLOCK, BLOCK), [0])


def over_rows(x: jax.Array) -> jax.Array:
    """A value per column, at every row of a block."""
    return lax.broadcast_in_dim(x, (BLOCK, BLOCK), [1])


def zeros_by_row() -> jax.Array:
    """Zero for every row of a block."""
    return plgpu.layout_cast(jnp.zeros(BLOCK, jnp.float32), BY_ROW)


class Ring(NamedTuple):
    """Slots in shared memory, which one warp group fills in order and the others read."""

    slots: int
    empty: Any  # barriers

    def slot(self, item: Any) -> Any:
        """The slot of the item with this number."""
        return lax.rem(item, jnp.int32(self.slots))

    def wait_until_empty(self, item: Any) -> None:
        """Before an item is copied: waits until all have released the previous item of its slot."""

        @pl.when(item >= self.slots)
        def _():
            plgpu.barrier_wait(self.empty.at[self.slot(item)])

    def release(self, item: Any) -> None:
        """After the last read of an item."""
        plgpu.barrier_arrive(self.empty.at[self.slot(item)])


def by_warp_group(
    groups: int, copy: Callable[[], None], multiply: Callable[[jax.Array], None]
) -> None:
    """Runs `multiply` in the first warp groups and `copy` in the last one."""
    group = lax.axis_index(THREAD)

    @pl.when(group == groups)
    def _():
        if groups > 1:  # otherwise every thread has the largest number of registers
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        copy()

    @pl.when(group < groups)
    def _():
        if groups > 1:
            plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
        multiply(group)


def launch(body: Callable[..., None], sizes: Any, names: tuple[str, ...], **options: Any) -> Any:
    """A call of the kernel `body` with static sizes; `names` are those of the axes of the grid."""
    return plgpu.kernel(
        lambda *refs: body(sizes, *refs),
        scratch_types=list(sizes.smem()),
        grid=sizes.grid,
        grid_names=names,
        num_threads=sizes.groups + 1,
        thread_name=THREAD,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=sizes.interpret,
        **options,
    )
