"""The two Triton kernels of the mLSTM; importing them requires Triton.

`states` runs along a sequence and stores the state at every chunk boundary; `outputs` then computes
all positions in parallel. `gpu_passes` says on which arrays. Gates come from `triton_gates`.

Source of the formulas: arXiv:2405.04517 and arXiv:2503.14376; the schedule is ours.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.mlstm.triton_gates import (
    COARSE,
    DECAY,
    KEY,
    NORMALIZER,
    QUERY,
    READ,
    SEGMENT,
    WRITE,
)
from pallas_kernels.triton_math import product


@triton.jit
@no_type_check
def states(
    gates,  # B H 8 T, float32
    lhs,  # B T H K
    rhs,  # B T H V
    C_first,  # B H K V, float32: the state before the first chunk in order; not read if FROM_ZEROS
    n_first,  # B H K, float32
    C_starts,  # B H N K V, states of the forward pass at chunk starts; read if REVERSED
    n_starts,  # B H N K
    N,
    C_out,  # B H N K V: the state before each chunk in order
    n_out,  # B H N K, float32
    C_last,  # B H K V, float32: the state after the last chunk in order
    n_last,  # B H K, float32
    scaling,  # B H N blocks, float32: sums of dC * C_starts; written if REVERSED
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    FROM_ZEROS: tl.constexpr,
    REVERSED: tl.constexpr,  # cotangents, from the last chunk to the first
    WITH_DNORM: tl.constexpr,  # the normalizer has a gradient
    UPCAST: tl.constexpr,
):
    """One block of one head's state, carried in registers through all chunks."""
    blocks: tl.constexpr = (K // BK) * (V // BV)
    steps_per_chunk: tl.constexpr = L // BT
    T = N * L
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks).to(tl.int64)
    offs_k = (block // (V // BV)) * BK + tl.arange(0, BK)
    offs_v = (block % (V // BV)) * BV + tl.arange(0, BV)
    # n has no columns: only the programs of the first block of columns store it.
    owns_n = block % (V // BV) == 0
    t = tl.arange(0, BT)
    # Offsets within a block fit 32 bits; larger ones are 64-bit and are added to the pointers.
    lhs_tile = t[None, :] * (H * K) + offs_k[:, None]
    rhs_tile = t[:, None] * (H * V) + offs_v[None, :]
    first_token = (program // blocks // H).to(tl.int64) * T * H + program // blocks % H
    gates += head * 8 * T
    state_tile = offs_k[:, None] * V + offs_v[None, :]
    C_out += head * N * (K * V) + state_tile
    C_starts += head * N * (K * V) + state_tile
    n_out += head * N * K + offs_k
    n_starts += head * N * K + offs_k
    C = tl.zeros((BK, BV), tl.float32)
    n = tl.zeros((BK,), tl.float32)
    if not FROM_ZEROS:
        C = tl.load(C_first + head * (K * V) + state_tile)
        n = tl.load(n_first + head * K + offs_k)
    for step in range(N * steps_per_chunk):
        position = (T - BT * (step + 1)) if REVERSED else BT * step
        chunk = (position // L).to(tl.int64)
        token = first_token + position.to(tl.int64) * H
        if step % steps_per_chunk == 0:
            tl.store(C_out + chunk * (K * V), C.to(C_out.dtype.element_ty))
            if owns_n:
                tl.store(n_out + chunk * K, n)
            decay = tl.load(gates + DECAY * T + position)
            C *= decay
            n *= decay
        weight = tl.load(gates + (READ if REVERSED else WRITE) * T + position + t)
        x = tl.load(lhs + token * K + lhs_tile).to(tl.float32) * weight[None, :]
        y = tl.load(rhs + token * V + rhs_tile)
        C += product(x.to(y.dtype), y, UPCAST)
        if WITH_DNORM or not REVERSED:
            if owns_n:
                if WITH_DNORM:
                    x *= tl.load(gates + NORMALIZER * T + position + t)[None, :]
                n += tl.sum(x, axis=1)
        if REVERSED:
            if step % steps_per_chunk == steps_per_chunk - 1:
                total = tl.sum(C * tl.load(C_starts + chunk * (K * V)).to(tl.float32))
                if owns_n:
                    total += tl.sum(n * tl.load(n_starts + chunk * K))
                tl.store(scaling + (head * N + chunk) * blocks + block, total)
    tl.store(C_last + head * (K * V) + state_tile, C)
    if owns_n:
        tl.store(n_last + head * K + offs_k, n)


@triton.jit
@no_type_check
def outputs(
    gates,  # B H 8 T, float32
    lhs,  # B T H A
    rhs,  # B T H A
    values,  # B T H W
    C,  # B H N K V, states at chunk boundaries, or their cotangents
    n,  # B H N K, float32
    primal,  # B T H W: the array whose cotangent `out` is; read if WITH_SUMS without NORMALIZE
    N,
    out,  # B T H W
    sums,  # B H W/BW T, float32: q n if NORMALIZE, else sums of primal * out over columns
    H: tl.constexpr,
    A: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    BT: tl.constexpr,  # output positions of one program
    BS: tl.constexpr,  # positions of rhs and values per iteration
    BA: tl.constexpr,  # block of A in products of lhs with rhs
    BC: tl.constexpr,  # block of A in the product of lhs with C
    BW: tl.constexpr,  # columns of W of one program
    LATER: tl.constexpr,  # sum over s >= t (t is a key); else over s <= t (t is a query)
    TRANSPOSED: tl.constexpr,  # C is W x A
    NORMALIZE: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    WITH_DNORM: tl.constexpr,  # add the cotangent of the normalizer to products of dh
    RESETS: tl.constexpr,
    EPS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BT positions of one head's result, from the state and from positions of the same chunk."""
    blocks: tl.constexpr = L // BT
    splits: tl.constexpr = W // BW
    T = N * L
    program = tl.program_id(0)
    batch = (program // blocks // N).to(tl.int64)
    chunk = program // blocks % N
    split = tl.program_id(1) % splits
    head = batch * H + tl.program_id(1) // splits
    # Positions count from the chunk start, so that offsets within a chunk fit 32 bits.
    begin = (program % blocks) * BT
    t = begin + tl.arange(0, BT)
    # Outside of the loop: inside it mlstm_dk takes all 255 registers on sm_100.
    offs_s = tl.arange(0, BS)
    a = tl.arange(0, BA)
    w = split * BW + tl.arange(0, BW)
    token = (batch * T + chunk * L) * H + tl.program_id(1) // splits
    lhs += token * A + t[:, None] * (H * A)
    rhs += token * A
    values += token * W
    gates += head * 8 * T + chunk * L
    out_tile = token * W + t[:, None] * (H * W) + w[None, :]
    dtype = values.dtype.element_ty
    fine = tl.load(gates + (KEY if LATER else QUERY) * T + t)
    coarse = tl.load(gates + COARSE * T + t)
    weight = tl.load(gates + (WRITE if LATER else READ) * T + t)
    dnorm = tl.zeros((BT,), tl.float32)
    if WITH_DNORM and not LATER:
        dnorm = tl.load(gates + NORMALIZER * T + t)

    # Contribution of the state at the chunk boundary.
    boundary = head * N + chunk
    C += boundary * (A * W)
    n += boundary * (W if TRANSPOSED else A)
    acc, q_n = _from_state(lhs, C, n, w, A, W, BT, BC, TRANSPOSED, NORMALIZE, dtype, UPCAST)
    if TRANSPOSED and (LATER or WITH_DNORM):
        n_columns = tl.load(n + w)[None, :]
        acc += n_columns if LATER else dnorm[:, None] * n_columns
    acc *= weight[:, None]
    d = weight * tl.sum(q_n, axis=1)

    # Contribution of the positions of the same chunk.
    lhs_block = tl.load(lhs + a[None, :])
    for start in range(begin if LATER else 0, L if LATER else begin + BT, BS):
        s = start + offs_s
        P = _products(lhs, lhs_block, rhs + (s * (H * A))[None, :], A, BA, BT, BS, UPCAST)
        if WITH_DNORM:
            P += tl.load(gates + NORMALIZER * T + s)[None, :] if LATER else dnorm[:, None]
        P *= _pair_weights(gates, t, s, T, fine, coarse, LATER, RESETS)
        if NORMALIZE:
            d += tl.sum(P, axis=1)  # not yet rounded to the dtype of values
        acc += product(P.to(dtype), tl.load(values + s[:, None] * (H * W) + w[None, :]), UPCAST)

    if NORMALIZE:
        bound = tl.load(gates + NORMALIZER * T + t)
        acc *= (1.0 / (tl.maximum(tl.abs(d), bound) + EPS))[:, None]
    tl.store(out + out_tile, acc.to(out.dtype.element_ty))
    if WITH_SUMS:
        if not NORMALIZE:
            d = tl.sum(tl.load(primal + out_tile).to(tl.float32) * acc, axis=1)
        tl.store(sums + (head * splits + split) * T + chunk * L + t, d)


@triton.jit
@no_type_check
def _from_state(
    lhs,
    C,
    n,
    w,
    A: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    dtype: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """lhs @ C in columns w, and the terms of lhs @ n, not yet summed over blocks of A."""
    acc = tl.zeros((BT, w.shape[0]), tl.float32)
    q_n = tl.zeros((BT, BC), tl.float32)
    for i in range(A // BC):
        inner = i * BC + tl.arange(0, BC)
        x = tl.load(lhs + inner[None, :])
        tile = inner[:, None] + w[None, :] * A if TRANSPOSED else inner[:, None] * W + w[None, :]
        if NORMALIZE:
            q_n += x.to(tl.float32) * tl.load(n + inner)[None, :]
        acc += product(x, tl.load(C + tile).to(dtype), UPCAST)
    return acc, q_n


@triton.jit
@no_type_check
def _products(
    lhs,
    lhs_block,
    rhs,
    A: tl.constexpr,
    BA: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Products of BT positions of lhs with BS of rhs; `lhs_block` has the first BA of A."""
    a = tl.arange(0, BA)
    if A == BA:
        P = product(lhs_block, tl.load(rhs + a[:, None]), UPCAST)
    else:
        P = tl.zeros((BT, BS), tl.float32)
        for i in range(A // BA):
            x = tl.load(lhs + i * BA + a[None, :])
            P += product(x, tl.load(rhs + i * BA + a[:, None]), UPCAST)
    return P


@triton.jit
@no_type_check
def _pair_weights(gates, t, s, T, fine, coarse, LATER: tl.constexpr, RESETS: tl.constexpr):
    """Weights of pairs of an output position t and an input position s; 0 if s does not count."""
    coarse_diff = coarse[:, None] - tl.load(gates + COARSE * T + s)[None, :]
    fine_s = tl.load(gates + (QUERY if LATER else KEY) * T + s)[None, :]
    log_weight = fine[:, None] + fine_s + (-coarse_diff if LATER else coarse_diff)
    visible = t[:, None] <= s[None, :] if LATER else t[:, None] >= s[None, :]
    if RESETS:
        segment = tl.load(gates + SEGMENT * T + t)
        visible &= segment[:, None] == tl.load(gates + SEGMENT * T + s)[None, :]
    return tl.exp(tl.where(visible, log_weight, -1e30))
