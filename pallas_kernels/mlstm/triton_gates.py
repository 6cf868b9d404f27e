"""Triton kernels for the gate arithmetic of the mLSTM; importing them requires Triton.

They compute what `packing` does in plain `jnp`, which XLA compiles to 18 launches forward and 11
more backward: one program has the gates of one chunk of one head. See `gates` for the formulas.
"""

from typing import no_type_check

import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.mlstm import gates, packing

NEG, TINY = tl.constexpr(gates.NEG), tl.constexpr(gates.TINY)
READ_FLOOR, LARGE = tl.constexpr(gates.READ_FLOOR), tl.constexpr(gates.LARGE)
CLOSED = tl.constexpr(gates.closed(jnp.float32))
COARSE, QUERY = tl.constexpr(packing.COARSE), tl.constexpr(packing.QUERY)
KEY, READ = tl.constexpr(packing.KEY), tl.constexpr(packing.READ)
WRITE, NORMALIZER = tl.constexpr(packing.WRITE), tl.constexpr(packing.NORMALIZER)
DECAY, SEGMENT = tl.constexpr(packing.DECAY), tl.constexpr(packing.SEGMENT)


@triton.jit
@no_type_check
def _max(x, y):
    """The larger one, or NaN if one of them is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
@no_type_check
def _compose(f_1, m_1, f_2, m_2):
    """Composes x -> max(f_1 + x, m_1) with the map of later positions."""
    return f_1 + f_2, _max(f_2 + m_1, m_2)


@triton.jit
@no_type_check
def _add_until_stop(x_1, stop_1, x_2, stop_2):
    """Sums from the end of a chunk, which start anew at a stop."""
    return x_2 + tl.where(stop_2 != 0, 0.0, x_1), stop_1 | stop_2


@triton.jit
@no_type_check
def _load_gates(
    log_i, log_f, reset, N, H: tl.constexpr, L: tl.constexpr, BL: tl.constexpr, RESETS: tl.constexpr
):
    """Positions of the program's chunk and their gates; beyond L steps that change nothing."""
    chunk = tl.program_id(0).to(tl.int64)  # of all sequences
    t = tl.arange(0, BL)
    inside = t < L
    offsets = (chunk * L + t) * H + tl.program_id(1)
    i = tl.load(log_i + offsets, inside, other=NEG)
    f = tl.load(log_f + offsets, inside, other=0.0)
    is_reset = tl.zeros((BL,), tl.int32)
    if RESETS:
        is_reset = tl.load(reset + chunk * L + t, inside, other=0)
    head = chunk // N * H + tl.program_id(1)
    return head, t, inside, i, f, is_reset


@triton.jit
@no_type_check
def _scan_stabilizers(i, f, is_reset):
    """The maps x -> max(f + x, m) of all steps up to each position; a reset makes x 0."""
    m = tl.where(is_reset != 0, _max(i, f), i)
    f = tl.where(is_reset != 0, float("-inf"), f)
    return tl.associative_scan((f, m), 0, _compose)


@triton.jit
@no_type_check
def chunk_maps(
    log_i,  # B T H, float32
    log_f,  # B T H
    reset,  # B T, int32; read if RESETS
    N,
    f_out,  # B H N, float32
    m_out,  # B H N
    H: tl.constexpr,
    L: tl.constexpr,
    BL: tl.constexpr,  # L, rounded up to a power of two
    RESETS: tl.constexpr,
):
    """The map x -> max(f + x, m) of each chunk on the stabilizer before it."""
    head, t, _, i, f, is_reset = _load_gates(log_i, log_f, reset, N, H, L, BL, RESETS)
    f, m = _scan_stabilizers(i, f, is_reset)
    chunk = head * N + tl.program_id(0) % N
    tl.store(f_out + chunk, _at(f, t, BL - 1))
    tl.store(m_out + chunk, _at(m, t, BL - 1))


@triton.jit
@no_type_check
def _m_before_chunk(f_maps, m_maps, m, chunk, BLOCK: tl.constexpr):
    """The stabilizer before a chunk: the maps of all earlier chunks, applied to the first m."""
    offsets = tl.arange(0, BLOCK)
    for start in range(0, chunk, BLOCK):
        j = start + offsets
        before = j < chunk
        # Sums of the maps after each one, without the map itself.
        later = tl.load(f_maps + j + 1, (j + 1 < chunk) & (offsets + 1 < BLOCK), other=0.0)
        later = tl.cumsum(later, axis=0, reverse=True)
        inside = later + tl.load(m_maps + j, before, other=float("-inf"))
        total = tl.sum(tl.load(f_maps + j, before, other=0.0), axis=0)
        m = _max(total + m, tl.max(inside, axis=0))
    return _max(m, NEG)


@triton.jit
@no_type_check
def _round(x, GRID: tl.constexpr):
    return tl.floor(x * GRID + 0.5) * (1.0 / GRID)


@triton.jit
@no_type_check
def _at(x, t, index):
    """The element of a vector at an index."""
    return tl.sum(tl.where(t == index, x, 0.0), axis=0)


@triton.jit
@no_type_check
def _before(x, first, t):
    """For each position the element before it, and `first` for position 0."""
    return tl.where(t == 0, first, tl.gather(x, tl.maximum(t - 1, 0), axis=0))


@triton.jit
@no_type_check
def _relative_steps(i, f, is_reset, m, m_start, t, GRID: tl.constexpr, SIGMOID: tl.constexpr):
    """As `gates.relative_steps`: coarse and fine parts of log f + m_before - m."""
    rounded, start = _round(m, GRID), _round(m_start, GRID)
    before = _before(rounded, start, t)
    total = (f + before) - rounded
    coarse = _round(f, GRID)
    is_small = tl.abs(before) < LARGE
    if not SIGMOID:
        exact = _before(m, m_start, t)
        m_step = _max(_max(f + exact, i), NEG)
        is_small &= (tl.abs(m - m_step) < 1) & (rounded < LARGE)
        rounding = (before - exact) - (rounded - m)
        total = tl.where(is_small, total, ((f + exact) - m_step) + rounding)
    fine = tl.where(is_small, f - coarse, total - _round(total, GRID))
    coarse = tl.where(is_small, coarse + (before - rounded), _round(total, GRID))
    is_closed = (total <= CLOSED) | (is_reset != 0)
    return tl.where(is_closed, CLOSED, coarse), tl.where(is_closed, 0.0, fine), rounded, start


@triton.jit
@no_type_check
def _decays(
    i,
    f,
    is_reset,
    m,
    m_start,
    t,
    L: tl.constexpr,
    GRID: tl.constexpr,
    SIGMOID: tl.constexpr,
    RESETS: tl.constexpr,
):
    """As `gates.decays`, of one chunk."""
    coarse, fine, rounded, start = _relative_steps(i, f, is_reset, m, m_start, t, GRID, SIGMOID)
    coarse, fine = tl.cumsum(coarse, axis=0), tl.cumsum(fine, axis=0)
    key, query = _max(i, NEG) - rounded, rounded - m
    from_start = coarse + (fine + query + (m_start - start))
    fine_end = _at(fine + query, t, L - 1)
    to_end = (_at(coarse, t, L - 1) - coarse) + (fine_end + (key - fine))
    segment = is_reset
    if RESETS:
        segment = tl.cumsum(is_reset, axis=0)
        from_start = tl.where(segment == 0, from_start, NEG)
        to_end = tl.where(segment == tl.sum(is_reset, axis=0), to_end, NEG)
    return coarse, fine, key, query, from_start, to_end, segment


@triton.jit
@no_type_check
def _inner_products(
    x, y, H: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BL: tl.constexpr, BV: tl.constexpr
):
    """Sums of x * y, `B T HV`, over the values of the program's head, for its chunk."""
    t = tl.arange(0, BL)
    token = (tl.program_id(0).to(tl.int64) * L * H + tl.program_id(1)) * V
    inside = (t < L)[:, None]
    sums = tl.zeros((BL,), tl.float32)
    for start in range(0, V, BV):
        tile = token + (t * (H * V))[:, None] + start + tl.arange(0, BV)[None, :]
        product = tl.load(x + tile, inside, other=0.0).to(tl.float32)
        product *= tl.load(y + tile, inside, other=0.0).to(tl.float32)
        sums += tl.sum(product, axis=1)
    return sums


@triton.jit
@no_type_check
def _store(packed, T, inside, coarse, query, key, weights, segment):
    """Stores the gates of one chunk; `packed` points to the first one."""
    read, write, normalizer, decay = weights
    tl.store(packed + COARSE * T, coarse, inside)
    tl.store(packed + QUERY * T, query, inside)
    tl.store(packed + KEY * T, key, inside)
    tl.store(packed + READ * T, read, inside)
    tl.store(packed + WRITE * T, write, inside)
    tl.store(packed + NORMALIZER * T, normalizer, inside)
    tl.store(packed + DECAY * T, tl.zeros_like(read) + decay, inside)
    tl.store(packed + SEGMENT * T, segment.to(tl.float32), inside)


@triton.jit
@no_type_check
def pack(
    log_i,  # B T H, float32
    log_f,  # B T H
    reset,  # B T, int32; read if RESETS
    m_first,  # B H, float32, before the first chunk; read if not BACKWARD
    f_maps,  # B H N, from `chunk_maps`; read if not BACKWARD, like m_maps
    m_maps,
    m_starts_saved,  # B H N; read if BACKWARD, like the next three
    d,  # B H 1 T, float32: q n
    h,  # B T HV
    dh,  # B T HV
    N,
    packed,  # B H 8 T, float32: `packing.PackedGates`
    m_starts,  # B H N, float32; written if not BACKWARD, like m_last
    m_last,  # B H
    H: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BL: tl.constexpr,
    BV: tl.constexpr,
    BLOCK: tl.constexpr,  # chunks per step of the loop over earlier ones
    GRID: tl.constexpr,  # log weights are split at multiples of 1 / GRID
    LOG_SCALE: tl.constexpr,  # log of 1/sqrt(K)
    EPS: tl.constexpr,
    BACKWARD: tl.constexpr,
    MAX_STATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SIGMOID: tl.constexpr,  # the forget gate
    RESETS: tl.constexpr,
):
    """The gates of one chunk, as `packing.forward` and `packing.backward_with_sums`."""
    head, t, inside, i, f, is_reset = _load_gates(log_i, log_f, reset, N, H, L, BL, RESETS)
    chunk = tl.program_id(0) % N
    m_start, m = tl.zeros((), tl.float32), tl.zeros((BL,), tl.float32)
    if MAX_STATE:
        if BACKWARD:
            m_start = tl.load(m_starts_saved + head * N + chunk)
        else:
            maps = head * N
            m_start = tl.load(m_first + head)
            m_start = _m_before_chunk(f_maps + maps, m_maps + maps, m_start, chunk, BLOCK)
        f_map, m_map = _scan_stabilizers(i, f, is_reset)
        m = _max(_max(m_map, f_map + m_start), NEG)
    if not BACKWARD:
        tl.store(m_starts + head * N + chunk, m_start)
        tl.store(m_last + head, _at(m, t, L - 1), chunk == N - 1)

    coarse, fine, key, query, from_start, to_end, segment = _decays(
        i, f, is_reset, m, m_start, t, L, GRID, SIGMOID, RESETS
    )
    decay = tl.exp(_at(from_start, t, L - 1))
    lift = m - _max(m, READ_FLOOR)
    query = fine + query + lift + LOG_SCALE
    read = tl.exp(from_start + lift + LOG_SCALE)
    bound = _max(tl.exp(-_max(m, READ_FLOOR)), TINY)
    normalizer = bound
    if BACKWARD:
        normalizer = tl.zeros((BL,), tl.float32)
        if NORMALIZE:
            q_n = tl.load(d + head * N * L + chunk * L + t, inside, other=0.0)
            norm = _max(tl.abs(q_n), bound) + EPS
            query, read = query - tl.log(norm), read / norm
            # |q n| enters the normalizer, and the normalizer divides h.
            sign = tl.where(q_n > 0, -1.0, 1.0)
            dnorm = sign * _inner_products(h, dh, H, V, L, BL, BV)
            normalizer = tl.where(tl.abs(q_n) > bound, dnorm, 0.0)

    packed += head * 8 * N * L + chunk * L + t
    weights = (read, tl.exp(to_end), normalizer, decay)
    _store(packed, N * L, inside, coarse, query, key - fine, weights, segment)


@triton.jit
@no_type_check
def gate_grads(
    k_dk,  # B H parts T, float32: sums of k * dk over blocks of K
    q_dq,  # B H parts T
    scaling,  # B H N parts: cotangents of the log scale of the state before each chunk
    end,  # B H, float32: of the state after the last chunk
    reset,  # B T, int32; read if RESETS
    N,
    dlog_i,  # B T H, float32
    dlog_f,  # B T H
    H: tl.constexpr,
    L: tl.constexpr,
    BL: tl.constexpr,
    PARTS: tl.constexpr,  # of k_dk and q_dq
    SCALING_PARTS: tl.constexpr,
    RESETS: tl.constexpr,
):
    """Cotangents of the log gates of one chunk, as `packing.gate_grads`."""
    sequence_chunk = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(0) % N
    head = sequence_chunk // N * H + tl.program_id(1)
    t = tl.arange(0, BL)
    inside = t < L
    T = N * L
    di = tl.zeros((BL,), tl.float32)
    flow = tl.zeros((BL,), tl.float32)
    for part in range(PARTS):
        offsets = (head * PARTS + part) * T + chunk * L + t
        di += tl.load(k_dk + offsets, inside, other=0.0)
        flow += tl.load(q_dq + offsets, inside, other=0.0)
    carry = tl.load(end + head, chunk == N - 1, other=0.0)
    for part in range(SCALING_PARTS):
        index = (head * N + chunk + 1) * SCALING_PARTS + part
        carry += tl.load(scaling + index, chunk < N - 1, other=0.0)
    flow -= di
    if RESETS:
        resets = reset + sequence_chunk * L + t
        stop = tl.load(resets + 1, t < L - 1, other=0)
        flow, stop = tl.associative_scan((flow, stop), 0, _add_until_stop, reverse=True)
        flow += tl.where(stop != 0, 0.0, carry)
        flow = tl.where(tl.load(resets, inside, other=0) != 0, 0.0, flow)
    else:
        flow = tl.cumsum(flow, axis=0, reverse=True) + carry
    offsets = (sequence_chunk * L + t) * H + tl.program_id(1)
    tl.store(dlog_i + offsets, di, inside)
    tl.store(dlog_f + offsets, flow, inside)
