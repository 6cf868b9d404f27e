"""The sLSTM in Triton for heads whose recurrent weights do not fit a multiprocessor.

A program computes one head of 16 rows of the batch, all steps, in blocks of cells. The weights come
from the L2 cache at every step, which gives a multiprocessor some 64 bytes a cycle: 8 K^2 bytes
bound a step, 8,192 cycles at K = 256 in bfloat16. The memory lies where its last value is to be
returned, and h where it is returned; threads see each other's writes behind a barrier.

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
    BLOCK: tl.constexpr,  # cells computed together
    KEPT: tl.constexpr,  # cells whose weights are kept, and which are computed together; or 0
    INNER: tl.constexpr,  # cells they are multiplied with together
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
    cells = tl.arange(0, BLOCK)
    others = tl.arange(0, INNER)
    leaf: tl.constexpr = B * H * K
    at_state = row * (H * K) + head * K + (b * (H * K))[:, None]
    first += at_state
    last += at_state
    x += row * (T * 4 * H * K) + head * K + (b * (T * 4 * H * K))[:, None]
    gates += row * (T * 4 * H * K) + head * K + (b * (T * 4 * H * K))[:, None]
    seen += row * (T * 3 * H * K) + head * K + (b * (T * 3 * H * K))[:, None]
    h += row * ((T + 1) * H * K) + head * K + (b * ((T + 1) * H * K))[:, None]
    bias += head * (4 * K)
    weights = r + head * (4 * K * K)
    at_weights = others[:, None] * (4 * K) + cells[None, :]
    for block in range(0, K, BLOCK):
        at = block + cells[None, :]
        c, n, old_h, m = load_four(first + at, leaf, inside)
        store_four(last + at, leaf, inside, c, n, old_h, m)
        tl.store(h + at, old_h.to(h.dtype.element_ty), inside)
    tl.debug_barrier()
    if KEPT > 0:
        kept_cells = tl.arange(0, KEPT)
        every = tl.arange(0, K)
        at_kept = every[:, None] * (4 * K) + kept_cells[None, :]
        kept_i = tl.load(weights + at_kept)
        kept_f = tl.load(weights + at_kept + K)
        kept_z = tl.load(weights + at_kept + 2 * K)
        kept_o = tl.load(weights + at_kept + 3 * K)
    for t in range(T):
        reset, masked = read_flags(flags + row * T + t, b, inside, T, FLAGGED)
        read = inside & (reset == 0)
        rows, marks = (x, bias, last, h, seen, gates), (reset, masked, inside)
        if KEPT > 0:
            whole = tl.load(h + every[None, :], read, other=0.0)
            w_i = product(whole, kept_i, UPCAST)
            w_f = product(whole, kept_f, UPCAST)
            w_z = product(whole, kept_z, UPCAST)
            w_o = product(whole, kept_o, UPCAST)
            parts = (w_i, w_f, w_z, w_o)
            _finish(parts, kept_cells, rows, marks, B, H, K, FLAGGED, SAVE, SAVE_GATES, SIGMOID)
        for block in range(KEPT, K, BLOCK):
            i = tl.zeros((ROWS, BLOCK), tl.float32)
            f = tl.zeros((ROWS, BLOCK), tl.float32)
            z = tl.zeros((ROWS, BLOCK), tl.float32)
            o = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, K, INNER):
                operand = tl.load(h + start + others[None, :], read, other=0.0)
                part = weights + start * (4 * K) + block + at_weights
                i += product(operand, tl.load(part), UPCAST)
                f += product(operand, tl.load(part + K), UPCAST)
                z += product(operand, tl.load(part + 2 * K), UPCAST)
                o += product(operand, tl.load(part + 3 * K), UPCAST)
            parts = (i, f, z, o)
            _finish(parts, block + cells, rows, marks, B, H, K, FLAGGED, SAVE, SAVE_GATES, SIGMOID)
        tl.debug_barrier()
        x += 4 * H * K
        gates += 4 * H * K
        seen += 3 * H * K
        h += H * K


@triton.jit
@no_type_check
def _finish(
    recurrent,
    cells,
    rows,
    marks,
    B: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    FLAGGED: tl.constexpr,
    SAVE: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """The step of some cells, from the recurrent part of their gates; `rows` are pointers."""
    x, bias, last, h, seen, gates = rows
    inside = marks[2]
    at = cells[None, :]
    x, bias = x + at, bias + at
    state = load_four(last + at, B * H * K, inside)
    pointers = (x, bias, seen + at, gates + at)
    c, n, new_h, m = step(
        recurrent, state, pointers, marks, H * K, K, FLAGGED, SAVE, SAVE_GATES, SIGMOID
    )
    store_four(last + at, B * H * K, inside, c, n, new_h, m)
    tl.store(h + H * K + at, new_h.to(h.dtype.element_ty), inside)


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
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    FLAGGED: tl.constexpr,
    SIGMOID: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of all steps of one head and 16 rows, from the last step to the first."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * ROWS
    b = row_numbers(T * H * K)
    inside = (row + b < B)[:, None]
    cells = tl.arange(0, BLOCK)
    others = tl.arange(0, INNER)
    leaf: tl.constexpr = B * H * K
    at_state = row * (H * K) + head * K + (b * (H * K))[:, None] + cells[None, :]
    dlast += at_state
    dfirst += at_state
    rows = (b * T)[:, None]
    last_step = row * T + T - 1
    here = head * K + cells[None, :]
    gates += last_step * (4 * H * K) + rows * (4 * H * K) + here
    seen += last_step * (3 * H * K) + rows * (3 * H * K) + here
    dh += last_step * (H * K) + rows * (H * K) + here
    dx += last_step * (4 * H * K) + rows * (4 * H * K) + head * K
    r += head * (4 * K * K) + others[:, None] + cells[None, :] * (4 * K)
    for block in range(0, K, BLOCK):
        dc, dn, dh_next, rho = load_four(dlast + block, leaf, inside)
        store_four(dfirst + block, leaf, inside, dc, dn, dh_next, rho)
    tl.debug_barrier()
    for back in range(T):
        reset, masked = read_flags(flags + row * T + T - 1 - back, b, inside, T, FLAGGED)
        for block in range(0, K, BLOCK):
            carry = load_four(dfirst + block, leaf, inside)
            at = (gates + block, seen + block, dh + block, dx + block + cells[None, :])
            _, _, _, _, dc, dn, rho = step_back(at, carry, masked, inside, H * K, FLAGGED, SIGMOID)
            store_four(dfirst + block, leaf, inside, dc, dn, carry[2], rho)
        tl.debug_barrier()
        for block in range(0, K, BLOCK):
            before = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, 4 * K, INNER):
                at = (start // K) * (H * K) + start % K + others[None, :]
                operand = tl.load(dx + at, inside, other=0.0)
                weights = tl.load(r + block * (4 * K) + start)
                before += product(operand, weights, UPCAST)
            if FLAGGED:
                # The forget factor is 0 after a reset, so only h is left to be cut off.
                dh_next = tl.load(dfirst + 2 * leaf + block, inside, other=0.0)
                before = tl.where(masked, dh_next, tl.where(reset, 0.0, before))
            tl.store(dfirst + 2 * leaf + block, before, inside)
        tl.debug_barrier()
        gates -= 4 * H * K
        seen -= 3 * H * K
        dh -= H * K
        dx -= 4 * H * K
