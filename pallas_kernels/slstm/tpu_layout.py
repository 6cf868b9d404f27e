"""The layout of the sLSTM TPU kernels: time first, narrow heads joined, all axes padded."""

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.slstm.options import MASKED, Inputs, Options, State


def pad(options: Options, x, r, b, state: State, flags) -> Inputs:
    """x `T H B 4K`, r `H K 4K`, b `H 4K`, state `4 H B K`, flags `T B lanes`, padded to blocks."""
    B, T, _, H, K = x.shape
    blocks, heads, width, _ = options.tile
    groups = H // heads
    x = common.pad(x.reshape(B, T, 4, groups, heads * K), 4, width)
    x = jnp.transpose(x, (1, 3, 0, 2, 4))
    x = common.pad(common.pad(x, 2, blocks.padded_batch), 0, blocks.padded_steps)
    x = x.reshape(blocks.padded_steps, groups, blocks.padded_batch, 4 * width)
    initial = jnp.stack(state).reshape(4, B, groups, heads * K)
    initial = jnp.swapaxes(common.pad(initial, 3, width), 1, 2)
    initial = common.pad(initial, 2, blocks.padded_batch)
    b = jnp.swapaxes(b.reshape(groups, heads, 4, K), 1, 2).reshape(groups, 4, heads * K)
    b = common.pad(b, 2, width).reshape(groups, 4 * width)
    return Inputs(x, _join_heads(r, heads, width), b, initial, _pad_flags(blocks, B, T, flags))


def unpad(h: jax.Array, final: jax.Array, shape) -> tuple[jax.Array, State]:
    """h `B T H K` and the state, from `T H B K` and `4 H B K`; `shape` is that of x."""
    B, T, _, H, K = shape
    unpadded = H // h.shape[1] * K  # lanes of a group without padding
    h = jnp.transpose(h[:T, :, :B, :unpadded], (2, 0, 1, 3)).reshape(B, T, H, K)
    final = jnp.swapaxes(final[:, :, :B, :unpadded], 1, 2).reshape(4, B, H, K)
    return h, (final[0], final[1], final[2], final[3])


def _join_heads(r: jax.Array, heads: int, width: int) -> jax.Array:
    """`H K 4 K` to `groups width 4*width`, block-diagonal: the heads of a group do not mix."""
    H, K = r.shape[:2]
    wide = r.reshape(H // heads, heads, K, 4, 1, K)
    if heads > 1:
        same_head = jnp.eye(heads, dtype=bool).reshape(1, heads, 1, 1, heads, 1)
        wide = jnp.where(same_head, wide, 0)
    wide = wide.reshape(H // heads, heads * K, 4, heads * K)
    wide = common.pad(common.pad(wide, 3, width), 1, width)
    return wide.reshape(H // heads, width, 4 * width)


def _pad_flags(blocks, B: int, T: int, flags: jax.Array | None) -> jax.Array | None:
    """`T B lanes`; None if no step is reset, masked or padding."""
    if flags is None:
        if blocks.padded_steps == T:
            return None
        flags = jnp.zeros((B, T), jnp.int32)
    # Masked padding leaves the final state and its gradient unchanged.
    flags = common.pad(common.pad(flags, 1, blocks.padded_steps, MASKED), 0, blocks.padded_batch)
    return jnp.broadcast_to(flags.T[..., None], (*flags.T.shape, common.lanes()))
