"""The sLSTM in Triton where the recurrent weights of a head stay on a multiprocessor.

A program computes one head of 16 rows of the batch, all steps: a product has no fewer rows. The
weights are loaded once, into shared memory, and the memory stays in registers.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2; the gradient as in `tpu_backward`.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.slstm.triton_step import (
    load_four,
    read_flags,
    row_numbers,
    step,
    step_back,
    store_four,
)
from pallas_kernels.triton_math import product

ROWS = tl.constexpr(16)


@triton.jit
@no_type_check
def forward(
    x,  # B T 4 H K
    r,  # H K 4 K, in the dtype of x
    bias,  # H 4 K, float32
    first,  # 4 B H K, float32: c, n, h and m
    flags,  # B T, int32
    h,  # B T+1 H K, in the dtype of x: before the first step, and after each
    last,  # 4 B H K, float32
    seen,  # B T 3 H K, float32: c, n and m as each step sees them
    gates,  # B T 4 H K, float32: pre-activations with the recurrent part
    B: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    FLAGGED: tl.constexpr,
    SAVE: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    SIGMOID: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """All steps of one head and 16 rows."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * ROWS
    b = row_numbers(T * H * K)
    inside = (row + b < B)[:, None]
    k = tl.arange(0, K)
    at_state = row * (H * K) + head * K + (b * (H * K))[:, None] + k[None, :]
    x += row * (T * 4 * H * K) + head * K + (b * (T * 4 * H * K))[:, None] + k[None, :]
    gates += row * (T * 4 * H * K) + head * K + (b * (T * 4 * H * K))[:, None] + k[None, :]
    seen += row * (T * 3 * H * K) + head * K + (b * (T * 3 * H * K))[:, None] + k[None, :]
    h += row * ((T + 1) * H * K) + head * K + (b * ((T + 1) * H * K))[:, None] + k[None, :]
    bias += head * (4 * K) + k[None, :]
    r += head * (4 * K * K) + k[:, None] * (4 * K) + k[None, :]
    r_i = tl.load(r)
    r_f = tl.load(r + K)
    r_z = tl.load(r + 2 * K)
    r_o = tl.load(r + 3 * K)
    state = load_four(first + at_state, B * H * K, inside)
    dtype = h.dtype.element_ty
    tl.store(h, state[2].to(dtype), inside)
    for t in range(T):
        reset, masked = read_flags(flags + row * T + t, b, inside, T, FLAGGED)
        operand = state[2].to(dtype)
        if FLAGGED:
            operand = tl.where(reset, 0.0, operand).to(dtype)
        i = product(operand, r_i, UPCAST)
        f = product(operand, r_f, UPCAST)
        z = product(operand, r_z, UPCAST)
        o = product(operand, r_o, UPCAST)
        pointers, marks = (x, bias, seen, gates), (reset, masked, inside)
        state = step(
            (i, f, z, o), state, pointers, marks, H * K, K, FLAGGED, SAVE, SAVE_GATES, SIGMOID
        )
        x += 4 * H * K
        gates += 4 * H * K
        seen += 3 * H * K
        h += H * K
        tl.store(h, state[2].to(dtype), inside)
    store_four(last + at_state, B * H * K, inside, state[0], state[1], state[2], state[3])


@triton.jit
@no_type_check
def backward(
    gates,  # B T 4 H K, float32
    r,  # H K 4 K, in the dtype of dx
    seen,  # B T 3 H K, float32
    dh,  # B T H K
    dlast,  # 4 B H K, float32: of c, n and h after the last step, and rho
    flags,  # B T, int32
    dx,  # B T 4 H K
    dfirst,  # 4 B H K, float32
    B: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    FLAGGED: tl.constexpr,
    SIGMOID: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of all steps of one head and 16 rows, from the last step to the first."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * ROWS
    b = row_numbers(T * H * K)
    inside = (row + b < B)[:, None]
    k = tl.arange(0, K)
    at_state = row * (H * K) + head * K + (b * (H * K))[:, None] + k[None, :]
    rows = (b * T)[:, None]
    last_step = row * T + T - 1
    here = head * K + k[None, :]
    gates += last_step * (4 * H * K) + rows * (4 * H * K) + here
    seen += last_step * (3 * H * K) + rows * (3 * H * K) + here
    dh += last_step * (H * K) + rows * (H * K) + here
    dx += last_step * (4 * H * K) + rows * (4 * H * K) + here
    r += head * (4 * K * K) + k[:, None] + k[None, :] * (4 * K)
    r_i = tl.load(r)
    r_f = tl.load(r + K)
    r_z = tl.load(r + 2 * K)
    r_o = tl.load(r + 3 * K)
    dc, dn, dh_next, rho = load_four(dlast + at_state, B * H * K, inside)
    dtype = dx.dtype.element_ty
    for back in range(T):
        reset, masked = read_flags(flags + row * T + T - 1 - back, b, inside, T, FLAGGED)
        i, f, z, o, dc, dn, rho = step_back(
            (gates, seen, dh, dx), (dc, dn, dh_next, rho), masked, inside, H * K, FLAGGED, SIGMOID
        )
        before = product(i.to(dtype), r_i, UPCAST)
        before += product(f.to(dtype), r_f, UPCAST)
        before += product(z.to(dtype), r_z, UPCAST)
        before += product(o.to(dtype), r_o, UPCAST)
        if FLAGGED:
            # The forget factor is 0 after a reset, so only h is left to be cut off.
            before = tl.where(masked, dh_next, tl.where(reset, 0.0, before))
        dh_next = before
        gates -= 4 * H * K
        seen -= 3 * H * K
        dh -= H * K
        dx -= 4 * H * K
    store_four(dfirst + at_state, B * H * K, inside, dc, dn, dh_next, rho)
