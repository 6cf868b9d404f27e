"""sLSTM Triton kernels for heads whose recurrent weights fit in shared memory.

Each program runs all steps of one head for 16 sequences, the smallest M of a tensor-core matmul. It
loads the weights once, into shared memory, and keeps the state in registers.

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
    k = tl.arange(0, K)
    state_offsets = b_start * (4 * H * K) + head * K + (b * (4 * H * K))[:, None] + k[None, :]
    x += b_start * T * (4 * H * K) + head * K + (b * T * (4 * H * K))[:, None] + k[None, :]
    gates += b_start * T * (4 * H * K) + head * K + (b * T * (4 * H * K))[:, None] + k[None, :]
    cnm += b_start * T * (3 * H * K) + head * K + (b * T * (3 * H * K))[:, None] + k[None, :]
    h += b_start * (T + 1) * (H * K) + head * K + (b * (T + 1) * (H * K))[:, None] + k[None, :]
    bias += head * (4 * K) + k[None, :]
    r += head * (4 * K * K) + k[:, None] * (4 * K) + k[None, :]
    weights = load_weights(r, K)
    state = load_four(initial + state_offsets, H * K, in_batch)
    dtype = h.dtype.element_ty
    tl.store(h, state[2].to(dtype), in_batch)
    for t in range(T):
        reset, masked = read_flags(flags + b_start * T + t, b, in_batch, T, FLAGGED)
        operand = state[2].to(dtype)
        if FLAGGED:
            operand = tl.where(reset, 0.0, operand).to(dtype)
        sums = recurrent_terms(operand, weights, UPCAST)
        pointers, masks = (x, bias, cnm, gates), (reset, masked, in_batch)
        state = step_forward(
            sums, state, pointers, masks, H * K, K, FLAGGED, SAVE, SAVE_GATES, SIGMOID
        )
        x += 4 * H * K
        gates += 4 * H * K
        cnm += 3 * H * K
        h += H * K
        tl.store(h, state[2].to(dtype), in_batch)
    store_four(final + state_offsets, H * K, in_batch, state[0], state[1], state[2], state[3])


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
    FLAGGED: tl.constexpr,
    SIGMOID: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Backward pass of one head and 16 sequences, from the last step to the first."""
    head = tl.program_id(0)
    b_start = tl.program_id(1).to(tl.int64) * BATCH_BLOCK
    b = batch_offsets(LARGE)
    in_batch = (b_start + b < B)[:, None]
    k = tl.arange(0, K)
    state_offsets = b_start * (4 * H * K) + head * K + (b * (4 * H * K))[:, None] + k[None, :]
    bt_offsets = (b * T)[:, None]
    last_step = b_start * T + T - 1
    cell_offsets = head * K + k[None, :]
    gates += last_step * (4 * H * K) + bt_offsets * (4 * H * K) + cell_offsets
    cnm += last_step * (3 * H * K) + bt_offsets * (3 * H * K) + cell_offsets
    dh += last_step * (H * K) + bt_offsets * (H * K) + cell_offsets
    dx += last_step * (4 * H * K) + bt_offsets * (4 * H * K) + cell_offsets
    r += head * (4 * K * K) + k[:, None] + k[None, :] * (4 * K)
    weights = load_weights(r, K)
    dc, dn, dh_next, rho = load_four(dfinal + state_offsets, H * K, in_batch)
    dtype = dx.dtype.element_ty
    for step in range(T):
        t = T - 1 - step
        reset, masked = read_flags(flags + b_start * T + t, b, in_batch, T, FLAGGED)
        i, f, z, o, dc, dn, rho = step_backward(
            (gates, cnm, dh, dx), (dc, dn, dh_next, rho), masked, in_batch, H * K, FLAGGED, SIGMOID
        )
        dh_prev = product(i.to(dtype), weights[0], UPCAST)
        dh_prev += product(f.to(dtype), weights[1], UPCAST)
        dh_prev += product(z.to(dtype), weights[2], UPCAST)
        dh_prev += product(o.to(dtype), weights[3], UPCAST)
        if FLAGGED:
            # At a reset f_scaled is 0 and so are dc and dn; dh must be cleared.
            dh_prev = tl.where(masked, dh_next, tl.where(reset, 0.0, dh_prev))
        dh_next = dh_prev
        gates -= 4 * H * K
        cnm -= 3 * H * K
        dh -= H * K
        dx -= 4 * H * K
    store_four(dinitial + state_offsets, H * K, in_batch, dc, dn, dh_next, rho)
