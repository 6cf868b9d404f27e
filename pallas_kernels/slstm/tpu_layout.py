"""The layout of the sLSTM's TPU kernels: time first, narrow heads joined, all axes padded."""

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.slstm.options import MASKED, Inputs, Options, State


def pad(options: Options, x, r, b, state: State, flags) -> Inputs:
    """x `T H B 4K`, r `H K 4K`, b `H 4K`, state `4 H B K`, flags `T B lanes`; whole blocks."""
    B, T, _, H, K = x.shape
    blocks, heads, width, _ = options.tile
    groups = H // heads
    x = common.pad(x.reshape(B, T, 4, groups, heads * K), 4, width)
    x = jnp.transpose(x, (1, 3, 0, 2, 4))
    x = common.pad(common.pad(x, 2, blocks.num_rows), 0, blocks.num_steps)
    x = x.reshape(blocks.num_steps, groups, blocks.num_rows, 4 * width)
    first = jnp.stack(state).reshape(4, B, groups, heads * K)
    first = jnp.swapaxes(common.pad(first, 3, width), 1, 2)
    first = common.pad(first, 2, blocks.num_rows)
    b = jnp.swapaxes(b.reshape(groups, heads, 4, K), 1, 2).reshape(groups, 4, heads * K)
    b = common.pad(b, 2, width).reshape(groups, 4 * width)
    return Inputs(x, _joined(r, heads, width), b, first, _padded_flags(blocks, B, T, flags))


def unpad(h: jax.Array, last: jax.Array, shape) -> tuple[jax.Array, State]:
    """h `B T H K` and the state, of `T H B K` and `4 H B K`."""
    B, T, _, H, K = shape
    used = H // h.shape[1] * K  # of the width
    h = jnp.transpose(h[:T, :, :B, :used], (2, 0, 1, 3)).reshape(B, T, H, K)
    last = jnp.swapaxes(last[:, :, :B, :used], 1, 2).reshape(4, B, H, K)
    return h, (last[0], last[1], last[2], last[3])


def _joined(r: jax.Array, heads: int, width: int) -> jax.Array:
    """`H K 4 K` to `groups width 4*width`; heads that share a group do not mix."""
    H, K = r.shape[:2]
    wide = r.reshape(H // heads, heads, K, 4, 1, K)
    if heads > 1:
        own = jnp.eye(heads, dtype=bool).reshape(1, heads, 1, 1, heads, 1)
        wide = jnp.where(own, wide, 0)
    wide = wide.reshape(H // heads, heads * K, 4, heads * K)
    wide = common.pad(common.pad(wide, 3, width), 1, width)
    return wide.reshape(H // heads, width, 4 * width)


def _padded_flags(blocks, B: int, T: int, flags: jax.Array | None) -> jax.Array | None:
    """`T B lanes`; None where no step is reset, masked or padding."""
    if flags is None:
        if blocks.num_steps == T:
            return None
        flags = jnp.zeros((B, T), jnp.int32)
    flags = common.pad(common.pad(flags, 1, blocks.num_steps, MASKED), 0, blocks.num_rows)
    return jnp.broadcast_to(flags.T[..., None], (*flags.T.shape, common.lanes()))
