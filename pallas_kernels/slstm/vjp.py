"""The sLSTM on a TPU with its exact gradient: arrays in, arrays out.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2. m is a gauge of (c, n): h does not depend
on it, so only a loss on the returned c, n and m needs a gradient through it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import common
from pallas_kernels.slstm import packed, sizes
from pallas_kernels.slstm.contract import (
    MASKED,
    RESET,
    SAVED_GATES_BYTES,
    State,
    check_arguments,
    first_m_gradient,
)
from pallas_kernels.slstm.decode import decode_vmem_bytes, slstm_decode
from pallas_kernels.slstm.tpu_backward import slstm_backward
from pallas_kernels.slstm.tpu_forward import slstm_forward


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is known of a call while tracing."""

    blocks: sizes.Blocks
    forget_gate: str
    save_gates: bool
    vmem_bytes: int
    interpret: Any


def slstm(
    x: jax.Array,
    r: jax.Array,
    b: jax.Array | None,
    state: State,
    reset: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    forget_gate: str = "sigmoid",
    save_gates: bool | None = None,
    vmem_bytes: int = common.SCOPED_BYTES,
) -> tuple[jax.Array, State]:
    """sLSTM over a sequence, computed by TPU kernels.

    Args:
        x: `B T 4 H K`, pre-activations of (i, f, z, o) without the recurrent part; float32 or
            bfloat16.
        r: `H K 4 K`, recurrent weights (input, gate, output); multiplied in the dtype of x.
        b: `H 4 K`, the bias of the four gates, added in float32; None is 0.
        state: the memory before the first step.
        reset: `B T`; where True, everything before this position is forgotten.
        mask: `B T`; where False, the state is left as it is, h is 0 and x is not read.
        forget_gate: "sigmoid" or "exp".
        save_gates: keep the gates for the gradient, 16 bytes for each element of h; False computes
            them again, None decides by `SAVED_GATES_BYTES`.
        vmem_bytes: what the kernels may use of the chip's VMEM.

    Any B, T, H and K: they are filled up to tiles, which changes no result. The gradients are exact
    for x, r and all of the state, for losses on h and on the returned state.

    Returns h `B T H K` in the dtype of x, and the memory after the last step.

    Raises:
        ValueError: shapes that do not fit, a dtype or a forget gate that is not known, heads wider
            than VMEM allows; with the width that fits.
    """
    check_arguments("slstm", x, r, state, forget_gate)
    B, T, _, H, K = x.shape
    heads = _heads_together(H, K)
    width = common.round_up(heads * K, common.lanes())
    blocks = sizes.blocks(B, T, H // heads, width, x.dtype, vmem_bytes)
    if blocks is None:
        widest = sizes.widest(x.dtype, vmem_bytes)
        raise ValueError(
            f"slstm: the recurrent weights of a head of width K={K} in {x.dtype} do not fit into "
            f"{vmem_bytes} bytes of VMEM; K may be up to {widest}. Use more heads, or another "
            "implementation."
        )
    if save_gates is None:
        save_gates = B * T * 4 * H * K * 4 <= SAVED_GATES_BYTES
    options = _Options(blocks, forget_gate, save_gates, vmem_bytes, common.interpreter())
    decodes = T == 1 and decode_vmem_bytes(B, H, K, x.dtype, r.dtype) <= vmem_bytes
    b = jnp.zeros((H, 4, K), jnp.float32) if b is None else b.astype(jnp.float32)
    compute = _step if decodes else _filled
    h, state = compute(options, x, r, b, state, reset, mask)  # pyright: ignore[reportGeneralTypeIssues]
    return (h if mask is None else jnp.where(mask[..., None, None], h, 0)), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(options: _Options, x, r, b, state: State, reset, mask) -> tuple[jax.Array, State]:
    """T = 1: the kernel for one step; its gradient is that of a sequence."""
    reset, mask = (None if flag is None else flag[:, 0] for flag in (reset, mask))
    h, state = slstm_decode(
        x[:, 0],
        r,
        b,
        state,
        reset,
        mask,
        forget_gate=options.forget_gate,
        vmem_bytes=options.vmem_bytes,
    )
    return h[:, None], state


def _step_forward(options: _Options, x, r, b, state, reset, mask):
    compute = lambda x, r, b, state: _filled(options, x, r, b, state, reset, mask)  # noqa: E731
    return jax.vjp(compute, x, r, b, state)


def _step_backward(options: _Options, pull, cotangents):
    del options
    return *pull(cotangents), None, None


_step.defvjp(_step_forward, _step_backward)


def _filled(options: _Options, x, r, b, state: State, reset, mask):
    """`_core` for any sizes: narrow heads together, everything filled up to whole blocks."""
    B, T, _, H, K = x.shape
    blocks, heads = options.blocks, _heads_together(H, K)
    groups, width = H // heads, common.round_up(heads * K, common.lanes())
    flags = _flags(blocks, B, T, reset, mask)
    x = common.fill(x.reshape(B, T, 4, groups, heads * K), 4, width)
    x = jnp.transpose(x, (1, 3, 0, 2, 4))
    x = common.fill(common.fill(x, 2, blocks.num_rows), 0, blocks.num_steps)
    x = x.reshape(blocks.num_steps, groups, blocks.num_rows, 4 * width)
    stacked = jnp.stack(state).astype(jnp.float32).reshape(4, B, groups, heads * K)
    stacked = jnp.swapaxes(common.fill(stacked, 3, width), 1, 2)
    stacked = common.fill(stacked, 2, blocks.num_rows)
    r = _weights(r, heads, width)
    b = jnp.swapaxes(b.reshape(groups, heads, 4, K), 1, 2).reshape(groups, 4, heads * K)
    b = common.fill(b, 2, width).reshape(groups, 1, 4 * width)
    h, last = _core(options, x, r, b, stacked, flags)  # pyright: ignore[reportGeneralTypeIssues]
    h = jnp.transpose(h[:T, :, :B, : heads * K], (2, 0, 1, 3)).reshape(B, T, H, K)
    last = jnp.swapaxes(last[:, :, :B, : heads * K], 1, 2).reshape(4, B, H, K)
    return h, (last[0], last[1], last[2], last[3])


def _heads_together(H: int, K: int) -> int:
    """Narrow heads side by side in the lanes of one wide head, as many as there is room for."""
    most = max(1, common.lanes() // K)
    return max(heads for heads in range(1, min(H, most) + 1) if H % heads == 0)


def _weights(r: jax.Array, heads: int, width: int) -> jax.Array:
    """`H K 4 K` to `groups width 4*width`; heads that share a group do not mix."""
    H, K = r.shape[:2]
    wide = r.reshape(H // heads, heads, K, 4, 1, K)
    if heads > 1:
        own = jnp.eye(heads, dtype=bool).reshape(1, heads, 1, 1, heads, 1)
        wide = jnp.where(own, wide, 0)
    wide = wide.reshape(H // heads, heads * K, 4, heads * K)
    wide = common.fill(common.fill(wide, 3, width), 1, width)
    return wide.reshape(H // heads, width, 4 * width)


def _flags(blocks: sizes.Blocks, B: int, T: int, reset, mask) -> jax.Array | None:
    """`T B lanes`, filled up; None where no step is reset, masked or filled up."""
    if reset is None and mask is None and blocks.num_steps == T:
        return None
    flags = jnp.zeros((B, T), jnp.int32)
    if reset is not None:
        flags = jnp.where(reset, RESET, flags)
    if mask is not None:
        flags = jnp.where(mask, flags, MASKED)
    flags = common.fill(common.fill(flags, 1, blocks.num_steps, MASKED), 0, blocks.num_rows)
    return jnp.broadcast_to(flags.T[..., None], (*flags.T.shape, common.lanes()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(options: _Options, x, r, b, state, flags) -> tuple[jax.Array, jax.Array]:
    """Whole blocks: x `T H B 4K`, r `H K 4K`, b `H 1 4K`, state `4 H B K`; h and the last state."""
    h, last = _forward(options, x, r, b, state, flags, save=False)
    return h, last


def _forward(options: _Options, x, r, b, state, flags, *, save: bool):
    return slstm_forward(
        x,
        packed.pack(r.astype(x.dtype)),
        b,
        state,
        flags,
        blocks=options.blocks,
        forget_gate=options.forget_gate,
        save=save,
        save_gates=save and options.save_gates,
        vmem_bytes=options.vmem_bytes,
        interpret=options.interpret,
    )


def _core_forward(options: _Options, x, r, b, state, flags):
    h, last, *saved = _forward(options, x, r, b, state, flags, save=True)
    h, seen_h = (checkpoint_name(a, "slstm_h") for a in (h, saved[0]))
    last, *seen = (checkpoint_name(a, "slstm_states") for a in (last, *saved[1:4]))
    gates = checkpoint_name(saved[4], "slstm_gates") if options.save_gates else None
    # With the gates kept nothing of x is needed: its dtype is that of h.
    kept_x = None if options.save_gates else x
    return (h, last), (kept_x, r, b, state, last, flags, seen_h, tuple(seen), gates)


def _core_backward(options: _Options, residuals, cotangents):
    x, r, b, first, last, flags, seen_h, seen, gates = residuals
    dh, dlast = cotangents
    weights = r.astype(dh.dtype)
    if gates is None:
        recurrent = _product(options, "THBK,HKJ->THBJ", seen_h, weights)
        gates = x.astype(jnp.float32) + b[None] + recurrent
    # A loss on the stored m that is one on the memory moves c and n with it; rho is what remains.
    rho = dlast[3] - dlast[0] * last[0] - dlast[1] * last[1]
    dx, dfirst = slstm_backward(
        gates,
        packed.pack(jnp.swapaxes(weights, 1, 2)),
        seen,
        dh,
        jnp.stack([dlast[0], dlast[1], dlast[2], rho]),
        flags,
        blocks=options.blocks,
        forget_gate=options.forget_gate,
        vmem_bytes=options.vmem_bytes,
        interpret=options.interpret,
    )
    dr = _product(options, "THBK,THBJ->HKJ", seen_h, dx).astype(r.dtype)
    db = jnp.sum(dx, axis=(0, 2), dtype=jnp.float32)[:, None]
    dc, dn, dh_first, rho = dfirst
    dm = first_m_gradient(rho, dc, dn, first[0], first[1])
    return dx, dr, db, jnp.stack([dc, dn, dh_first, dm]), None


_core.defvjp(_core_forward, _core_backward)


def _product(options: _Options, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """All steps at once, in float32; float32 operands keep all their digits."""
    if options.interpret:  # not every product of bfloat16 with a float32 result exists on a CPU
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)
