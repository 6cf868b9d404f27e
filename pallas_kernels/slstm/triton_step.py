"""One sLSTM step and its gradient as Triton device functions; importing them requires Triton.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.slstm import options
from pallas_kernels.triton_math import product

RESET, MASKED = tl.constexpr(options.RESET), tl.constexpr(options.MASKED)


@triton.jit
@no_type_check
def log_forget(f, SIGMOID: tl.constexpr):
    """Log of the forget gate, from its pre-activation f."""
    if SIGMOID:
        f = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f)))
    return f


@triton.jit
@no_type_check
def stabilize(i, log_f, n, m):
    """Stabilized forget and input gates, the new m, and whether m comes from the carry.

    Where nothing has been written yet (n = 0), the old m is ignored.
    """
    log_carry = tl.where(n == 0.0, float("-inf"), log_f + m)
    m = tl.maximum(tl.maximum(log_carry, i), -1e30)  # never -inf, as -inf - -inf is NaN
    return tl.exp(log_carry - m), tl.exp(i - m), m, log_carry >= i


@triton.jit
@no_type_check
def tanh(x):
    """tanh from the sigmoid; exactly 1 or -1 for large |x|."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
@no_type_check
def cell_forward(i, f, z, o, c, n, m, SIGMOID: tl.constexpr):
    """c, n, h and m after a step, from the gates and the previous state."""
    f_scaled, i_scaled, m, _ = stabilize(i, log_forget(f, SIGMOID), n, m)
    c = f_scaled * c + i_scaled * tanh(z)
    n = f_scaled * n + i_scaled
    # sigmoid(o) c / n with one division; if exp(-o) overflows, the result is 0, as it should be.
    # n is 0 as long as all input gates were 0; c and h are 0 then.
    return c, n, tl.where(n == 0.0, 0.0, c / (n * (1.0 + tl.exp(-o)))), m


@triton.jit
@no_type_check
def cell_backward(i, f, z, o, c, n, m, dh, dc, dn, rho, SIGMOID: tl.constexpr):
    """Gradients of the gates, and dc, dn and rho before the step, from those after it.

    m only rescales c and n, so it is treated as a constant here; `rho` follows the maximum from the
    last m back to the input gate that set it.
    """
    f_scaled, i_scaled, _, from_carry = stabilize(i, log_forget(f, SIGMOID), n, m)
    z = tanh(z)
    o = tl.sigmoid(o)
    n_after = f_scaled * n + i_scaled
    inverse = 1.0 / tl.where(n_after == 0.0, 1.0, n_after)
    ratio = (f_scaled * c + i_scaled * z) * inverse
    weighted = dh * o * inverse
    dc += weighted
    dn -= weighted * ratio
    rho_carry = tl.where(from_carry, rho, 0.0)
    di = i_scaled * (dc * z + dn) + (rho - rho_carry)
    df = f_scaled * (dc * c + dn * n) + rho_carry
    if SIGMOID:
        df *= tl.sigmoid(-f)
    dz = i_scaled * dc * (1.0 - z * z)
    do = dh * ratio * o * (1.0 - o)
    return di, df, dz, do, f_scaled * dc, f_scaled * dn, rho_carry


@triton.jit
@no_type_check
def batch_offsets(LARGE: tl.constexpr):
    """0 to 15, the sequences of a program; int64 if offsets of their gates may exceed int32."""
    b = tl.arange(0, 16)
    if LARGE:
        b = b.to(tl.int64)
    return b


@triton.jit
@no_type_check
def load_four(pointer, stride, in_batch):
    """Four blocks `stride` elements apart, in float32; 0 outside the batch."""
    i = tl.load(pointer, in_batch, other=0.0).to(tl.float32)
    f = tl.load(pointer + stride, in_batch, other=0.0).to(tl.float32)
    z = tl.load(pointer + 2 * stride, in_batch, other=0.0).to(tl.float32)
    o = tl.load(pointer + 3 * stride, in_batch, other=0.0).to(tl.float32)
    return i, f, z, o


@triton.jit
@no_type_check
def store_four(pointer, stride, in_batch, i, f, z, o):
    """Stores four blocks `stride` elements apart; the inverse of `load_four`."""
    dtype = pointer.dtype.element_ty
    tl.store(pointer, i.to(dtype), in_batch)
    tl.store(pointer + stride, f.to(dtype), in_batch)
    tl.store(pointer + 2 * stride, z.to(dtype), in_batch)
    tl.store(pointer + 3 * stride, o.to(dtype), in_batch)


@triton.jit
@no_type_check
def load_weights(pointer, K: tl.constexpr):
    """Blocks of the recurrent weights of the four gates."""
    return (
        tl.load(pointer),
        tl.load(pointer + K),
        tl.load(pointer + 2 * K),
        tl.load(pointer + 3 * K),
    )


@triton.jit
@no_type_check
def recurrent_terms(h, weights, UPCAST: tl.constexpr):
    """h @ r of the four gates."""
    i = product(h, weights[0], UPCAST)
    f = product(h, weights[1], UPCAST)
    z = product(h, weights[2], UPCAST)
    o = product(h, weights[3], UPCAST)
    return i, f, z, o


@triton.jit
@no_type_check
def read_flags(flags, b, in_batch, T, FLAGGED: tl.constexpr):
    """Whether each sequence is reset, and masked, at the step that `flags` points to."""
    if FLAGGED:
        flag = tl.load(flags + (b * T)[:, None], in_batch, other=0)
    else:
        flag = tl.zeros(in_batch.shape, tl.int32)
    return flag & RESET != 0, flag & MASKED != 0


@triton.jit
@no_type_check
def step_forward(
    recurrent,
    state,
    pointers,
    masks,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    FLAGGED: tl.constexpr,
    SAVE: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """c, n, h and m of a block of cells after a step; stores the residuals if `SAVE`.

    `recurrent` (h @ r of each gate) and `state` are four blocks each. `pointers` point to blocks of
    x, bias, cnm and gates; `masks` are `reset`, `masked` and `in_batch`.
    """
    x, bias, cnm, gates = pointers
    reset, masked, in_batch = masks
    x_i, x_f, x_z, x_o = load_four(x, STRIDE, in_batch)
    i = recurrent[0] + x_i + tl.load(bias)
    f = recurrent[1] + x_f + tl.load(bias + K)
    z = recurrent[2] + x_z + tl.load(bias + 2 * K)
    o = recurrent[3] + x_o + tl.load(bias + 3 * K)
    c = state[0]
    n = state[1]
    m = state[3]
    if FLAGGED:
        c = tl.where(reset, 0.0, c)
        n = tl.where(reset, 0.0, n)
        m = tl.where(reset, 0.0, m)
    if SAVE:
        tl.store(cnm, c, in_batch)
        tl.store(cnm + STRIDE, n, in_batch)
        tl.store(cnm + 2 * STRIDE, m, in_batch)
    if SAVE_GATES:
        store_four(gates, STRIDE, in_batch, i, f, z, o)
    c, n, h, m = cell_forward(i, f, z, o, c, n, m, SIGMOID)
    if FLAGGED:
        c = tl.where(masked, state[0], c)
        n = tl.where(masked, state[1], n)
        h = tl.where(masked, state[2], h)
        m = tl.where(masked, state[3], m)
    return c, n, h, m


@triton.jit
@no_type_check
def step_backward(
    pointers,
    carry,
    masked,
    in_batch,
    STRIDE: tl.constexpr,
    FLAGGED: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """Gradients of the gates of a block of cells, also stored in dx; and dc, dn, rho before a step.

    `carry` is dc, dn, dh and rho after it; `pointers` point to blocks of gates, cnm, dh and dx.
    """
    gates, cnm, dh, dx = pointers
    i, f, z, o = load_four(gates, STRIDE, in_batch)
    c = tl.load(cnm, in_batch, other=0.0)
    n = tl.load(cnm + STRIDE, in_batch, other=1.0)
    m = tl.load(cnm + 2 * STRIDE, in_batch, other=0.0)
    dh_total = tl.load(dh, in_batch, other=0.0).to(tl.float32) + carry[2]
    i, f, z, o, dc, dn, rho = cell_backward(
        i, f, z, o, c, n, m, dh_total, carry[0], carry[1], carry[3], SIGMOID
    )
    if FLAGGED:
        i = tl.where(masked, 0.0, i)
        f = tl.where(masked, 0.0, f)
        z = tl.where(masked, 0.0, z)
        o = tl.where(masked, 0.0, o)
        dc = tl.where(masked, carry[0], dc)
        dn = tl.where(masked, carry[1], dn)
        rho = tl.where(masked, carry[3], rho)
    store_four(dx, STRIDE, in_batch, i, f, z, o)
    return i, f, z, o, dc, dn, rho
