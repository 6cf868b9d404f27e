"""Block sizes of the mLSTM Mosaic GPU kernels, by a rule on head widths and shared memory."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import common, mosaic
from pallas_kernels.hardware import ARCHITECTURES
from pallas_kernels.mlstm.chunks import chunk_length

BLOCK = 64
"""Side of the blocks that all tiles are made of: 64 bfloat16 are a line of shared memory."""

_BLOCK_BYTES = BLOCK * BLOCK * 2
_SLOT_BYTES = 2 * 1024
"""Of gates and normalizers in a slot of `outputs`."""

_RESERVED_BYTES = 3 * 1024
"""Barriers, and arrays that are used only in some launches."""


class States(NamedTuple):
    """Blocks of `mosaic_states`."""

    groups: int  # warp groups that multiply, each for 64 rows of the state
    blocks: int  # blocks of columns of one program
    slots: int

    def programs(self, K: int, V: int) -> int:
        """Programs per head."""
        return (K // (BLOCK * self.groups)) * (V // (BLOCK * self.blocks))


class Outputs(NamedTuple):
    """Blocks of `mosaic_outputs`, for one of its four results."""

    groups: int  # warp groups that multiply, each for 64 positions
    blocks: int  # blocks of columns of the result of one program
    inner: int  # blocks of the contracted width in one slot
    slots: int


class Tile(NamedTuple):
    """Tiling of one call."""

    chunk: int  # L, positions in a chunk
    states: States
    to_v: Outputs  # of h and dv
    to_k: Outputs  # of dq and dk


def width(size: int, lanes: int) -> int:
    """The width that heads are padded to."""
    return common.round_up(size, BLOCK)


def choose(K: int, V: int, dtype: jnp.dtype, T: int, chunk_size: int | None) -> Tile:
    """The tile of one call; raises ValueError as in `refusal`."""
    if reason := refusal(K, V, dtype, chunk_size):
        raise ValueError(f"mlstm: {reason}.")
    K, V = common.round_up(K, BLOCK), common.round_up(V, BLOCK)
    chunk = chunk_length(K, V, T, chunk_size, BLOCK)
    groups, blocks = (_divisor(size // BLOCK, 2) for size in (K, V))
    to_v, to_k = _outputs(K, V, chunk), _outputs(V, K, chunk)
    assert to_v is not None and to_k is not None  # otherwise `refusal` gives a reason
    return Tile(chunk, States(groups, blocks, 4), to_v, to_k)


def refusal(K: int, V: int, dtype: jnp.dtype, chunk_size: int | None = None) -> str | None:
    """Why a call is not supported, naming sizes that are; None if it is."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"Mosaic GPU kernels compute with bfloat16, not with {jnp.dtype(dtype).name}"
    if reason := common.chunk_refusal(chunk_size, BLOCK):
        return reason
    K, V = common.round_up(K, BLOCK), common.round_up(V, BLOCK)
    for name, inner, result in (("K", K, V), ("V", V, K)):
        if _outputs(inner, result, BLOCK) is None:
            return f"{name}={inner} exceeds the shared memory; use more heads of at most 1024"
    return None


def _outputs(inner: int, result: int, chunk: int) -> Outputs | None:
    """Blocks for a contraction of width `inner`; None if no block fits the shared memory."""
    blocks, inner_blocks = _divisor(result // BLOCK, 4), _divisor(inner // BLOCK, 4)
    slot = max(blocks, inner_blocks) * _BLOCK_BYTES + _SLOT_BYTES
    for groups in (2, 1) if chunk % (2 * BLOCK) == 0 else (1,):
        lhs = groups * max(inner // BLOCK, blocks) * _BLOCK_BYTES
        slots = (ARCHITECTURES[mosaic.CHIP].shared_bytes - _RESERVED_BYTES - lhs) // slot
        if slots >= 2:
            return Outputs(groups, blocks, inner_blocks, min(slots, 4))
    return None


def _divisor(count: int, limit: int) -> int:
    """The largest divisor of `count` up to `limit`."""
    return next(size for size in range(limit, 0, -1) if count % size == 0)
