"""A step of the sLSTM in Triton, and its gradient; needs Triton to import.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.slstm import options

RESET, MASKED = tl.constexpr(options.RESET), tl.constexpr(options.MASKED)


@triton.jit
@no_type_check
def log_forget(f, SIGMOID: tl.constexpr):
    """log of the factor that f becomes."""
    if SIGMOID:
        f = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f)))
    return f


@triton.jit
@no_type_check
def scales(i, log_f, n, m):
    """The factors of old and new memory, the new log-scale, and whether it came from the old one.

    Where nothing is stored yet (n = 0) the old scale does not count.
    """
    kept = tl.where(n == 0.0, -1e30, log_f + m)
    from_old = kept >= i
    # One of the two factors is exp(0).
    smaller = tl.exp(-tl.abs(kept - i))
    f_scaled = tl.where(from_old, 1.0, smaller)
    i_scaled = tl.where(from_old, smaller, 1.0)
    return f_scaled, i_scaled, tl.maximum(kept, i), from_old


@triton.jit
@no_type_check
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
@no_type_check
def advance(i, f, z, o, c, n, m, SIGMOID: tl.constexpr):
    """c, n, h and m after a step, from the gates and the memory before."""
    f_scaled, i_scaled, m, _ = scales(i, log_forget(f, SIGMOID), n, m)
    c = f_scaled * c + i_scaled * tanh(z)
    n = f_scaled * n + i_scaled
    # sigmoid(o) c / n with one division; where exp(-o) overflows the quotient is 0, as it should.
    return c, n, c / (n * (1.0 + tl.exp(-o))), m


@triton.jit
@no_type_check
def retreat(i, f, z, o, c, n, m, dh, dc, dn, rho, SIGMOID: tl.constexpr):
    """Gradients of the gates, and of c, n and m's path before a step, from those after it.

    m is a gauge of c and n, so it is held constant here; `rho` follows the path of the maximum from
    the last m back to the input gate that made it.
    """
    f_scaled, i_scaled, _, from_old = scales(i, log_forget(f, SIGMOID), n, m)
    z = tanh(z)
    o = tl.sigmoid(o)
    inverse = 1.0 / (f_scaled * n + i_scaled)
    ratio = (f_scaled * c + i_scaled * z) * inverse
    weighted = dh * o * inverse
    dc += weighted
    dn -= weighted * ratio
    kept = tl.where(from_old, rho, 0.0)
    di = i_scaled * (dc * z + dn) + (rho - kept)
    df = f_scaled * (dc * c + dn * n) + kept
    if SIGMOID:
        df *= tl.sigmoid(-f)
    dz = i_scaled * dc * (1.0 - z * z)
    do = dh * ratio * o * (1.0 - o)
    return di, df, dz, do, f_scaled * dc, f_scaled * dn, kept


@triton.jit
@no_type_check
def row_numbers(SIZE: tl.constexpr):
    """Rows of a program, `SIZE` numbers of h apart, wide enough for offsets of what is read."""
    if 16 * 4 * (SIZE + 1) < (1 << 31):
        rows = tl.arange(0, 16)
    else:
        rows = tl.arange(0, 16).to(tl.int64)
    return rows


@triton.jit
@no_type_check
def load_four(pointer, STRIDE: tl.constexpr, inside):
    """Blocks that lie `STRIDE` numbers apart, in float32; 0 where not `inside`."""
    i = tl.load(pointer, inside, other=0.0).to(tl.float32)
    f = tl.load(pointer + STRIDE, inside, other=0.0).to(tl.float32)
    z = tl.load(pointer + 2 * STRIDE, inside, other=0.0).to(tl.float32)
    o = tl.load(pointer + 3 * STRIDE, inside, other=0.0).to(tl.float32)
    return i, f, z, o


@triton.jit
@no_type_check
def store_four(pointer, STRIDE: tl.constexpr, inside, i, f, z, o):
    """Writes what `load_four` reads."""
    dtype = pointer.dtype.element_ty
    tl.store(pointer, i.to(dtype), inside)
    tl.store(pointer + STRIDE, f.to(dtype), inside)
    tl.store(pointer + 2 * STRIDE, z.to(dtype), inside)
    tl.store(pointer + 3 * STRIDE, o.to(dtype), inside)


@triton.jit
@no_type_check
def read_flags(flags, b, inside, T: tl.constexpr, FLAGGED: tl.constexpr):
    """Whether each row is reset at the step that `flags` points to, and whether that is masked."""
    if FLAGGED:
        flag = tl.load(flags + (b * T)[:, None], inside, other=0)
    else:
        flag = tl.zeros(inside.shape, tl.int32)
    return flag & RESET != 0, flag & MASKED != 0


@triton.jit
@no_type_check
def step(
    recurrent,
    state,
    pointers,
    marks,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    FLAGGED: tl.constexpr,
    SAVE: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """c, n, h and m of some cells after a step; saves what the gradient needs.

    `recurrent` and `state` are four blocks; `pointers` are to blocks of x, bias, `seen` and gates;
    `marks` say of each row whether it is reset, masked, and inside of the batch.
    """
    x, bias, seen, gates = pointers
    reset, masked, inside = marks
    x_i, x_f, x_z, x_o = load_four(x, STRIDE, inside)
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
        tl.store(seen, c, inside)
        tl.store(seen + STRIDE, n, inside)
        tl.store(seen + 2 * STRIDE, m, inside)
    if SAVE_GATES:
        store_four(gates, STRIDE, inside, i, f, z, o)
    c, n, h, m = advance(i, f, z, o, c, n, m, SIGMOID)
    if FLAGGED:
        c = tl.where(masked, state[0], c)
        n = tl.where(masked, state[1], n)
        h = tl.where(masked, state[2], h)
        m = tl.where(masked, state[3], m)
    return c, n, h, m


@triton.jit
@no_type_check
def step_back(
    pointers,
    carry,
    masked,
    inside,
    STRIDE: tl.constexpr,
    FLAGGED: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """Gradients of four gates of some cells, written to `dx` too, and dc, dn, rho before a step.

    `carry` is dc, dn, dh and rho after it; `pointers` are to blocks of gates, `seen`, dh and dx.
    """
    gates, seen, dh, dx = pointers
    i, f, z, o = load_four(gates, STRIDE, inside)
    c = tl.load(seen, inside, other=0.0)
    n = tl.load(seen + STRIDE, inside, other=1.0)
    m = tl.load(seen + 2 * STRIDE, inside, other=0.0)
    total = tl.load(dh, inside, other=0.0).to(tl.float32) + carry[2]
    i, f, z, o, dc, dn, rho = retreat(
        i, f, z, o, c, n, m, total, carry[0], carry[1], carry[3], SIGMOID
    )
    if FLAGGED:
        i = tl.where(masked, 0.0, i)
        f = tl.where(masked, 0.0, f)
        z = tl.where(masked, 0.0, z)
        o = tl.where(masked, 0.0, o)
        dc = tl.where(masked, carry[0], dc)
        dn = tl.where(masked, carry[1], dn)
        rho = tl.where(masked, carry[3], rho)
    store_four(dx, STRIDE, inside, i, f, z, o)
    return i, f, z, o, dc, dn, rho
