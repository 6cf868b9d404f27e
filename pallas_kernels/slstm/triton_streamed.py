"""sLSTM Triton kernels for heads whose recurrent weights do not fit in shared memory.

Each program runs all steps of one head for 16 sequences, in blocks of cells. Every step reloads the
8 K^2 bytes (bfloat16) of weights from the L2 cache. At about 64 bytes per cycle and multiprocessor,
a step at K = 256 takes at least 8,192 cycles. The carry is stored in the output arrays `final` and
`h`; barriers make the stores of other threads visible.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.slstm.triton_step import (
    batch_offsets,
    load_four,
    load_weights,
    read_flags,
    recurrent_terms,
    step_backward,
    step_forward,
    store_four,
)
from pallas_kernels.triton_math import product

BATCH_BLOCK = tl.constexpr(16)


@triton.jit
@no_type_check
def forward(
    x,  # B T 4 H K
    r,  # H K 4 K, in the dtype of x
    bias,  # H 4 K, float32
    initial,  # B 4 H K, float32: c, n, h and m before the first step
    flags,  # B T, int32
    B,
    T,
    h,  # B T+1 H K, in the dtype of x: before the first step and after every step
    final,  # B 4 H K, float32: c, n, h and m after the last step
    cnm,  # B T 3 H K, float32: c, n and m before each step, with its reset applied
    gates,  # B T 4 H K, float32: pre-activations, recurrent term included
    H: tl.constexpr,
    K: tl.constexpr,
    LARGE: tl.constexpr,  # offsets within 16 sequences may exceed 32 bits
    BLOCK: tl.constexpr,  # output cells per product
    CACHED: tl.constexpr,  # output cells whose weights are loaded only once; 0: none
    INNER: tl.constexpr,  # input cells per product
    FLAGGED: tl.constexpr,
    SAVE: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    SIGMOID: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """All steps of one head and 16 sequences."""
    head = tl.program_id(0)
    b_start = tl.program_id(1).to(tl.int64) * BATCH_BLOCK
    b = batch_offsets(LARGE)
    in_batch = (b_start + b < B)[:, None]
    cells = tl.arange(0, BLOCK)
    inner = tl.arange(0, INNER)
    leaf: tl.constexpr = H * K
    state_offsets = b_start * (4 * H * K) + head * K + (b * (4 * H * K))[:, None]
    initial += state_offsets
    final += state_offsets
    x += b_start * T * (4 * H * K) + head * K + (b * T * (4 * H * K))[:, None]
    gates += b_start * T * (4 * H * K) + head * K + (b * T * (4 * H * K))[:, None]
    cnm += b_start * T * (3 * H * K) + head * K + (b * T * (3 * H * K))[:, None]
    h += b_start * (T + 1) * (H * K) + head * K + (b * (T + 1) * (H * K))[:, None]
    bias += head * (4 * K)
    weights = r + head * (4 * K * K)
    weight_offsets = inner[:, None] * (4 * K) + cells[None, :]
    for block in range(0, K, BLOCK):
        offsets = block + cells[None, :]
        c, n, old_h, m = load_four(initial + offsets, leaf, in_batch)
        store_four(final + offsets, leaf, in_batch, c, n, old_h, m)
        tl.store(h + offsets, old_h.to(h.dtype.element_ty), in_batch)
    tl.debug_barrier()
    if CACHED > 0:
        cached_cells = tl.arange(0, CACHED)
        all_cells = tl.arange(0, K)
        cached_offsets = all_cells[:, None] * (4 * K) + cached_cells[None, :]
        cached_weights = load_weights(weights + cached_offsets, K)
    for t in range(T):
        reset, masked = read_flags(flags + b_start * T + t, b, in_batch, T, FLAGGED)
        h_mask = in_batch & (reset == 0)
        pointers, masks = (x, bias, final, h, cnm, gates), (reset, masked, in_batch)
        if CACHED > 0:
            h_all = tl.load(h + all_cells[None, :], h_mask, other=0.0)
            sums = recurrent_terms(h_all, cached_weights, UPCAST)
            _finish_block(
                sums, cached_cells, pointers, masks, H, K, FLAGGED, SAVE, SAVE_GATES, SIGMOID
            )
        for block in range(CACHED, K, BLOCK):
            sums = _streamed_terms(
                h, h_mask, weights + block + weight_offsets, K, BLOCK, INNER, UPCAST
            )
            _finish_block(
                sums, block + cells, pointers, masks, H, K, FLAGGED, SAVE, SAVE_GATES, SIGMOID
            )
        tl.debug_barrier()
        x += 4 * H * K
        gates += 4 * H * K
        cnm += 3 * H * K
        h += H * K


@triton.jit
@no_type_check
def _streamed_terms(
    h,
    h_mask,
    weights,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """h @ r of the four gates for a block of cells, in blocks of input cells."""
    i = tl.zeros((BATCH_BLOCK, BLOCK), tl.float32)
    f = tl.zeros((BATCH_BLOCK, BLOCK), tl.float32)
    z = tl.zeros((BATCH_BLOCK, BLOCK), tl.float32)
    o = tl.zeros((BATCH_BLOCK, BLOCK), tl.float32)
    for start in range(0, K, INNER):
        operand = tl.load(h + start + tl.arange(0, INNER)[None, :], h_mask, other=0.0)
        w = weights + start * (4 * K)
        i += product(operand, tl.load(w), UPCAST)
        f += product(operand, tl.load(w + K), UPCAST)
        z += product(operand, tl.load(w + 2 * K), UPCAST)
        o += product(operand, tl.load(w + 3 * K), UPCAST)
    return i, f, z, o


@triton.jit
@no_type_check
def _finish_block(
    recurrent,
    cells,
    pointers,
    masks,
    H: tl.constexpr,
    K: tl.constexpr,
    FLAGGED: tl.constexpr,
    SAVE: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """Completes a step for a block of cells; `recurrent` is h @ r for its four gates."""
    x, bias, final, h, cnm, gates = pointers
    in_batch = masks[2]
    offsets = cells[None, :]
    x, bias = x + offsets, bias + offsets
    state = load_four(final + offsets, H * K, in_batch)
    block_pointers = (x, bias, cnm + offsets, gates + offsets)
    c, n, new_h, m = step_forward(
        recurrent, state, block_pointers, masks, H * K, K, FLAGGED, SAVE, SAVE_GATES, SIGMOID
    )
    store_four(final + offsets, H * K, in_batch, c, n, new_h, m)
    # Stored in the next slot of h: other blocks of cells still read the current one.
    tl.store(h + H * K + offsets, new_h.to(h.dtype.element_ty), in_batch)


@triton.jit
@no_type_check
def backward(
    gates,  # B T 4 H K, float32
    r,  # H K 4 K, in the dtype of dx
    cnm,  # B T 3 H K, float32: c, n and m before each step
    dh,  # B T H K
    dfinal,  # B 4 H K, float32: gradients of c, n and h after the last step, and rho
    flags,  # B T, int32
    B,
    T,
    dx,  # B T 4 H K
    dinitial,  # B 4 H K, float32: likewise before the first step
    H: tl.constexpr,
    K: tl.constexpr,
    LARGE: tl.constexpr,  # offsets within 16 sequences may exceed 32 bits
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    FLAGGED: tl.constexpr,
    SIGMOID: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Backward pass of one head and 16 sequences, from the last step to the first."""
    head = tl.program_id(0)
    b_start = tl.program_id(1).to(tl.int64) * BATCH_BLOCK
    b = batch_offsets(LARGE)
    in_batch = (b_start + b < B)[:, None]
    cells = tl.arange(0, BLOCK)
    inner = tl.arange(0, INNER)
    leaf: tl.constexpr = H * K
    state_offsets = b_start * (4 * H * K) + head * K + (b * (4 * H * K))[:, None] + cells[None, :]
    dfinal += state_offsets
    dinitial += state_offsets
    bt_offsets = (b * T)[:, None]
    last_step = b_start * T + T - 1
    cell_offsets = head * K + cells[None, :]
    gates += last_step * (4 * H * K) + bt_offsets * (4 * H * K) + cell_offsets
    cnm += last_step * (3 * H * K) + bt_offsets * (3 * H * K) + cell_offsets
    dh += last_step * (H * K) + bt_offsets * (H * K) + cell_offsets
    dx += last_step * (4 * H * K) + bt_offsets * (4 * H * K) + head * K
    r += head * (4 * K * K) + inner[:, None] + cells[None, :] * (4 * K)
    for block in range(0, K, BLOCK):
        dc, dn, dh_next, rho = load_four(dfinal + block, leaf, in_batch)
        store_four(dinitial + block, leaf, in_batch, dc, dn, dh_next, rho)
    tl.debug_barrier()
    for step in range(T):
        t = T - 1 - step
        reset, masked = read_flags(flags + b_start * T + t, b, in_batch, T, FLAGGED)
        for block in range(0, K, BLOCK):
            carry = load_four(dinitial + block, leaf, in_batch)
            pointers = (gates + block, cnm + block, dh + block, dx + block + cells[None, :])
            _, _, _, _, dc, dn, rho = step_backward(
                pointers, carry, masked, in_batch, H * K, FLAGGED, SIGMOID
            )
            store_four(dinitial + block, leaf, in_batch, dc, dn, carry[2], rho)
        tl.debug_barrier()
        for block in range(0, K, BLOCK):
            dh_prev = tl.zeros((BATCH_BLOCK, BLOCK), tl.float32)
            for start in range(0, 4 * K, INNER):
                offsets = (start // K) * (H * K) + start % K + inner[None, :]
                operand = tl.load(dx + offsets, in_batch, other=0.0)
                weights = tl.load(r + block * (4 * K) + start)
                dh_prev += product(operand, weights, UPCAST)
            if FLAGGED:
                # At a reset f_scaled is 0 and so are dc and dn; dh must be cleared.
                dh_next = tl.load(dinitial + 2 * leaf + block, in_batch, other=0.0)
                dh_prev = tl.where(masked, dh_next, tl.where(reset, 0.0, dh_prev))
            tl.store(dinitial + 2 * leaf + block, dh_prev, in_batch)
        tl.debug_barrier()
        gates -= 4 * H * K
        cnm -= 3 * H * K
        dh -= H * K
        dx -= 4 * H * K
