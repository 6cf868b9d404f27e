"""The two Triton kernels of the mLSTM; needs Triton to import.

`states` runs along a sequence and leaves the memory at every chunk's border, `outputs` then works
on all positions at once. Forward and backward are the same two, with other arrays:

    result   mine  theirs  values  memory at     weight of the memory
    h        q     k       v       chunk start   across_t
    dq       dh    v       k       chunk start   across_t      memory transposed
    dk       v     dh      q       chunk end     written_s     memory transposed, cotangent
    dv       k     q       dh      chunk end     written_s     cotangent

    states   rows  values  weight      from
    C        k     v       written_s   the first chunk
    dC       q     dh      across_t    the last chunk

No product is needed twice but that of dh and v, for dq and for dk, whose sums run over different
positions. Gates come ready made: `gates.forward_rows`, `gates.backward_rows`.

Source of the formulas: arXiv:2405.04517 and arXiv:2503.14376; the schedule is ours.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.triton_math import product

# Rows of the gates, as in `gates.Packed`.
COARSE = tl.constexpr(0)
ROW = tl.constexpr(1)
SOURCE = tl.constexpr(2)
ACROSS = tl.constexpr(3)
WRITTEN = tl.constexpr(4)
EXTRA = tl.constexpr(5)
KEPT = tl.constexpr(6)
SEGMENT = tl.constexpr(7)


@triton.jit
@no_type_check
def states(
    gates,  # B H 8 T, float32
    rows,  # B T H K
    values,  # B T H V
    first,  # B H K V, float32: the memory that the first chunk to be computed meets
    first_n,  # B H K, float32
    starts,  # B H N K V, of the other direction; read where REVERSED
    starts_n,  # B H N K
    borders,  # B H N K V: the memory that each chunk meets
    borders_n,  # B H N K, float32
    last,  # B H K V, float32
    last_n,  # B H K, float32
    scaling,  # B H N blocks, float32: the sum of memory and `starts`; written where REVERSED
    T: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    REVERSED: tl.constexpr,
    WITH_EXTRA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of one head's memory, through all chunks."""
    blocks: tl.constexpr = (K // BK) * (V // BV)
    pieces: tl.constexpr = L // BT
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks).to(tl.int64)
    at_k = (block // (V // BV)) * BK + tl.arange(0, BK)
    at_v = (block % (V // BV)) * BV + tl.arange(0, BV)
    has_n = block % (V // BV) == 0
    t = tl.arange(0, BT)
    # Offsets within a block are small numbers; what may not fit 32 bits is added to a pointer.
    at_rows = t[None, :] * (H * K) + at_k[:, None]
    at_values = t[:, None] * (H * V) + at_v[None, :]
    token = (head // H) * T * H + head % H
    gates += head * 8 * T
    tile = at_k[:, None] * V + at_v[None, :]
    borders += head * (T // L) * K * V + tile
    starts += head * (T // L) * K * V + tile
    borders_n += head * (T // L) * K + at_k
    starts_n += head * (T // L) * K + at_k
    C = tl.load(first + head * K * V + tile)
    n = tl.load(first_n + head * K + at_k)
    for piece in range(T // BT):
        position = (T - BT * (piece + 1)) if REVERSED else BT * piece
        chunk = (position // L).to(tl.int64)
        here = token + position.to(tl.int64) * H
        if piece % pieces == 0:
            tl.store(borders + chunk * (K * V), C.to(borders.dtype.element_ty))
            if has_n:
                tl.store(borders_n + chunk * K, n)
            kept = tl.load(gates + KEPT * T + position)
            C *= kept
            n *= kept
        weight = tl.load(gates + (ACROSS if REVERSED else WRITTEN) * T + position + t)
        x = tl.load(rows + here * K + at_rows).to(tl.float32) * weight[None, :]
        y = tl.load(values + here * V + at_values)
        C += product(x.to(y.dtype), y, UPCAST)
        if WITH_EXTRA:
            x *= tl.load(gates + EXTRA * T + position + t)[None, :]
        if WITH_EXTRA or not REVERSED:
            n += tl.sum(x, axis=1)
        if REVERSED:
            if piece % pieces == pieces - 1:
                found = tl.sum(C * tl.load(starts + chunk * (K * V)).to(tl.float32))
                if has_n:
                    found += tl.sum(n * tl.load(starts_n + chunk * K))
                tl.store(scaling + (head * (T // L) + chunk) * blocks + block, found)
    tl.store(last + head * K * V + tile, C)
    if has_n:
        tl.store(last_n + head * K + at_k, n)


@triton.jit
@no_type_check
def outputs(
    gates,  # B H 8 T, float32
    mine,  # B T H A
    theirs,  # B T H A
    values,  # B T H W
    memory,  # B H N K V
    vector,  # B H N K, float32: n, or its cotangent
    known,  # B T H W: what the result is multiplied with for `sums`
    out,  # B T H W
    sums,  # B H W/BW T, float32: the normalizer; or per position the sum of known * out
    T: tl.constexpr,
    H: tl.constexpr,
    A: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    BR: tl.constexpr,  # positions of one program
    BC: tl.constexpr,  # positions it looks at together
    BA: tl.constexpr,  # of A, in products of mine with theirs
    BM: tl.constexpr,  # of A, in the product with the memory
    BW: tl.constexpr,  # of W, for one program
    LATER: tl.constexpr,  # a position looks at itself and later ones; else at earlier ones
    TRANSPOSED: tl.constexpr,  # the memory is W x A
    NORMALIZE: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    WITH_EXTRA: tl.constexpr,  # products of dh have the normalizer's share
    RESETS: tl.constexpr,
    EPS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """All of what BR positions of a head read, from the memory and from their own chunk."""
    program = tl.program_id(0)
    head = (program // (T // BR)).to(tl.int64)
    chunk = (program % (T // BR)) // (L // BR)
    split = tl.program_id(1)
    # Positions are counted from the start of the chunk, so that offsets are small numbers.
    begin = (program % (L // BR)) * BR
    r = begin + tl.arange(0, BR)
    c = tl.arange(0, BC)
    a = tl.arange(0, BA)
    w = split * BW + tl.arange(0, BW)
    token = ((head // H) * T + chunk * L) * H + head % H
    mine += token * A + r[:, None] * (H * A)
    theirs += token * A
    values += token * W
    gates += head * 8 * T + chunk * L
    at_out = token * W + r[:, None] * (H * W) + w[None, :]
    dtype = values.dtype.element_ty
    near = tl.load(gates + (SOURCE if LATER else ROW) * T + r)
    coarse = tl.load(gates + COARSE * T + r)
    weight = tl.load(gates + (WRITTEN if LATER else ACROSS) * T + r)
    extra = tl.zeros((BR,), tl.float32)
    if WITH_EXTRA and not LATER:
        extra = tl.load(gates + EXTRA * T + r)

    # What the memory at the chunk's border says.
    border = head * (T // L) + chunk
    memory += border * A * W
    vector += border * (W if TRANSPOSED else A)
    acc = tl.zeros((BR, BW), tl.float32)
    d = tl.zeros((BR,), tl.float32)
    for i in range(A // BM):
        at = i * BM + tl.arange(0, BM)
        x = tl.load(mine + at[None, :])
        tile = at[:, None] + w[None, :] * A if TRANSPOSED else at[:, None] * W + w[None, :]
        acc += product(x, tl.load(memory + tile).to(dtype), UPCAST)
        if NORMALIZE:
            d += tl.sum(x.to(tl.float32) * tl.load(vector + at)[None, :], axis=1)
    if TRANSPOSED and (LATER or WITH_EXTRA):
        share = tl.load(vector + w)[None, :]
        acc += share if LATER else extra[:, None] * share
    acc *= weight[:, None]
    d *= weight

    # What the positions of the same chunk say.
    held = tl.load(mine + a[None, :])
    for start in range(begin if LATER else 0, L if LATER else begin + BR, BC):
        s = start + c
        row = s * (H * A)
        if A == BA:
            P = product(held, tl.load(theirs + row[None, :] + a[:, None]), UPCAST)
        else:
            P = tl.zeros((BR, BC), tl.float32)
            for i in range(A // BA):
                x = tl.load(mine + i * BA + a[None, :])
                P += product(x, tl.load(theirs + row[None, :] + i * BA + a[:, None]), UPCAST)
        if WITH_EXTRA:
            P += tl.load(gates + EXTRA * T + s)[None, :] if LATER else extra[:, None]
        far = coarse[:, None] - tl.load(gates + COARSE * T + s)[None, :]
        other = tl.load(gates + (ROW if LATER else SOURCE) * T + s)[None, :]
        exponent = near[:, None] + other + (-far if LATER else far)
        seen = r[:, None] <= s[None, :] if LATER else r[:, None] >= s[None, :]
        if RESETS:
            segment = tl.load(gates + SEGMENT * T + r)
            seen &= segment[:, None] == tl.load(gates + SEGMENT * T + s)[None, :]
        P *= tl.exp(tl.where(seen, exponent, -1e30))
        if NORMALIZE:
            d += tl.sum(P, axis=1)  # before it is rounded
        acc += product(P.to(dtype), tl.load(values + s[:, None] * (H * W) + w[None, :]), UPCAST)

    if NORMALIZE:
        bound = tl.load(gates + EXTRA * T + r)
        acc *= (1.0 / (tl.maximum(tl.abs(d), bound) + EPS))[:, None]
    tl.store(out + at_out, acc.to(out.dtype.element_ty))
    if WITH_SUMS:
        if not NORMALIZE:
            d = tl.sum(tl.load(known + at_out).to(tl.float32) * acc, axis=1)
        tl.store(sums + (head * (W // BW) + split) * T + chunk * L + r, d)
