"""The gates of a chunkwise mLSTM, made ready for kernels: decays, stabilisers, weights of states.

All of it depends on the gates alone, so a kernel needs no running maximum and no scalar recurrence:
m of every position is known before the first product. Everything is float32.

A running sum of log f is kept in two parts (`Decays.coarse`, `Decays.fine`), so that differences of
large sums keep their digits. A reset is no number in any sum: positions of different segments are
masked. Source: arXiv:2405.04517, appendix; arXiv:2503.14376, section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import NEG

TINY = 2.0**-120
"""Lower bound of the normaliser, where exp(-m) has underflowed and the query meets nothing."""

READ_FLOOR = -20.0
"""Lowest log-scale at which a memory is read: far below, exp(-m) is no float32."""

GRID = 2.0**10
"""Steps per unit of the coarse part of a sum: exact in float32 up to 2^14 in magnitude."""


class LogGates(NamedTuple):
    """Gates in log space."""

    log_i: jax.Array  # B T H; NEG where masked
    log_f: jax.Array  # B T H; 0 where masked
    reset: jax.Array | None  # B T; False where masked


class Decays(NamedTuple):
    """Log decays of N chunks, and the log-scale m of every position; `B H N L` unless said."""

    log_i: jax.Array
    coarse: jax.Array  # sum of log f from the chunk's start up to each position, on the grid
    fine: jax.Array  # the rest of that sum
    segment: jax.Array | None  # resets seen in the chunk, up to and including each position
    to_row: jax.Array  # from the chunk's start; NEG once a reset lies between
    to_end: jax.Array  # weight of each position in the state at the chunk's end
    across: jax.Array  # `B H N`: of the state at the start, in the state at the end
    m: jax.Array  # after each position
    m_start: jax.Array  # `B H N`: before the chunk
    m_end: jax.Array  # `B H N`: after the chunk
    through_f: jax.Array  # where m_t is log f_t + m_{t-1}
    kept: jax.Array  # where m_t depends on m before the step: through_f, and no reset


class Packed(NamedTuple):
    """Rows of the array `B H 8 T` that a kernel reads; see `forward_rows`, `backward_rows`."""

    coarse: jax.Array
    row: jax.Array
    source: jax.Array
    across: jax.Array
    written: jax.Array
    extra: jax.Array
    kept: jax.Array
    segment: jax.Array


COARSE, ROW, SOURCE, ACROSS, WRITTEN, EXTRA, KEPT, SEGMENT = range(len(Packed._fields))


def log_gates(
    i: jax.Array,
    f: jax.Array,
    reset: jax.Array | None,
    mask: jax.Array | None,
    *,
    input_gate: str,
) -> LogGates:
    """Log gates `B T H`; a masked step writes nothing and forgets nothing, whatever it holds."""
    if mask is not None:
        i, f = (jnp.where(mask[..., None], gate, 0) for gate in (i, f))
        reset = None if reset is None else reset & mask
    i, f = i.astype(jnp.float32), f.astype(jnp.float32)
    log_i = i if input_gate == "exp" else -jax.nn.softplus(-i)
    log_f = -jax.nn.softplus(-f)
    if mask is not None:
        log_i = jnp.where(mask[..., None], log_i, NEG)
        log_f = jnp.where(mask[..., None], log_f, 0)
    return LogGates(log_i, log_f, reset)


def decays(gates: LogGates, m_first: jax.Array, chunk: int, *, max_state: bool) -> Decays:
    """Decays in chunks of `chunk` positions.

    Args:
        gates: their T is a multiple of `chunk`.
        m_first: `B H`, the log-scale before the first step.
        max_state: whether m follows the gates; else it is 0 everywhere.
    """
    log_i, log_f = (_by_chunk(g, chunk) for g in (gates.log_i, gates.log_f))
    reset = None
    if gates.reset is not None:
        reset = _by_chunk(jnp.broadcast_to(gates.reset[..., None], gates.log_i.shape), chunk)
    summed = log_f if reset is None else jnp.where(reset, 0, log_f)
    on_grid = jnp.round(summed * GRID) / GRID
    coarse, fine = jnp.cumsum(on_grid, axis=-1), jnp.cumsum(summed - on_grid, axis=-1)
    to_row = coarse + fine
    to_end = (coarse[..., -1:] - coarse) + (fine[..., -1:] + (log_i - fine))
    across = to_row[..., -1]
    segment = None
    if reset is not None:
        segment = jnp.cumsum(reset.astype(jnp.float32), axis=-1)
        across = jnp.where(segment[..., -1] == 0, across, NEG)
        to_end = jnp.where(segment == segment[..., -1:], to_end, NEG)
    inside = _inside_maximum(log_i, log_f, to_row, reset)
    if segment is not None:
        to_row = jnp.where(segment == 0, to_row, NEG)
    m_start, m_end, m = _log_scales(inside, to_row, across, m_first)
    if not max_state:
        m_start, m_end, m = (jnp.zeros_like(a) for a in (m_start, m_end, m))
    before = jnp.concatenate([m_start[..., None], m[..., :-1]], axis=-1)
    before = before if reset is None else jnp.where(reset, 0, before)
    through_f = log_f + before >= log_i
    kept = through_f if reset is None else through_f & ~reset
    return Decays(
        log_i, coarse, fine, segment, to_row, to_end, across, m, m_start, m_end, through_f, kept
    )


def _inside_maximum(log_i, log_f, to_row, reset):
    """The largest log weight of a source in each row, from inside the chunk alone."""
    if reset is None:
        return to_row + jax.lax.cummax(log_i - to_row, axis=log_i.ndim - 1)
    # The empty memory that a reset writes has m = 0, so that step ends with max(log f + 0, i).
    source = jnp.where(reset, jnp.maximum(log_i, log_f), log_i) - to_row

    def join(a, b):
        (x, _), (y, starts) = a, b
        return jnp.where(starts, y, jnp.maximum(x, y)), a[1] | starts

    highest, _ = jax.lax.associative_scan(join, (source, reset), axis=source.ndim - 1)
    return to_row + highest


def _log_scales(inside, to_row, across, m_first):
    """m before and after each chunk and after each position: max(log f_t + m_{t-1}, log i_t)."""

    def join(x, y):
        return x[0] + y[0], jnp.maximum(y[0] + x[1], y[1])

    own = (across, inside[..., -1])
    decay, m = jax.lax.associative_scan(join, own, axis=across.ndim - 1)
    m_end = jnp.maximum(jnp.maximum(decay, NEG) + m_first[..., None], m)
    m_start = jnp.concatenate([m_first[..., None], m_end[..., :-1]], axis=-1)
    return m_start, m_end, jnp.maximum(inside, to_row + m_start[..., None])


def forward_rows(x: Decays, qk_dim: int) -> jax.Array:
    """The array `B H 8 T` of the forward kernel, in the order of `Packed`.

    log weight of source s in row t, over e^m and with 1/sqrt(K):
    (coarse_t - coarse_s) + (row_t + source_s); of the state at the chunk's start: log across_t.
    `extra` is the lower bound of the normaliser.
    """
    m = jnp.maximum(x.m, READ_FLOOR)
    across = qk_dim**-0.5 * jnp.exp(x.to_row + x.m_start[..., None] - m)
    row = x.fine - m - 0.5 * jnp.log(float(qk_dim))
    return _pack(x, row, across, lower_bound(m))


def backward_rows(x: Decays, qk_dim: int, norm: jax.Array | None, sign: jax.Array) -> jax.Array:
    """The array `B H 8 T` of the backward kernel: as forward, weights divided by `norm` as well.

    So the kernel reads cotangents of h as they come: times `sign`, in place of the lower bound,
    their product with h is the cotangent of a row's normaliser times `norm`; all `B H N L`.
    """
    m = jnp.maximum(x.m, READ_FLOOR)
    row = x.fine - m - 0.5 * jnp.log(float(qk_dim))
    across = qk_dim**-0.5 * jnp.exp(x.to_row + x.m_start[..., None] - m)
    if norm is not None:
        row, across = row - jnp.log(norm), across / norm
    return _pack(x, row, across, sign)


class StepFactors(NamedTuple):
    """What one step multiplies with; `B H` each."""

    kept: jax.Array  # the memory
    added: jax.Array  # the key
    bound: jax.Array  # the normaliser is at least this
    read: jax.Array  # the query


def step_factors(
    gates: LogGates, m: jax.Array, *, max_state: bool
) -> tuple[StepFactors, jax.Array]:
    """Factors of a step from the gates `B 1 H` and m before it, and m after it."""
    log_i, log_f = gates.log_i[:, 0], gates.log_f[:, 0]
    kept = log_f + m
    before = kept
    if gates.reset is not None:
        reset = gates.reset  # B 1, as the gates' B H
        kept, before = jnp.where(reset, NEG, kept), jnp.where(reset, log_f, kept)
    m = jnp.maximum(before, log_i) if max_state else jnp.zeros_like(m)
    # Memories are read at a log-scale of at least READ_FLOOR: the query carries the difference.
    read = jnp.exp(m - jnp.maximum(m, READ_FLOOR))
    return StepFactors(jnp.exp(kept - m), jnp.exp(log_i - m), lower_bound(m), read), m


def lower_bound(m: jax.Array) -> jax.Array:
    """What a normaliser is at least: exp(-m), as long as float32 can say it."""
    return jnp.maximum(jnp.exp(-jnp.maximum(m, READ_FLOOR)), TINY)


def _pack(x: Decays, row, across, extra) -> jax.Array:
    written = jnp.exp(x.to_end - x.m_end[..., None])
    kept = jnp.exp(x.across + x.m_start - x.m_end)[..., None]
    rows = Packed(
        coarse=x.coarse,
        row=row,
        source=x.log_i - x.fine,
        across=across,
        written=written,
        extra=extra,
        kept=jnp.broadcast_to(kept, row.shape),
        segment=jnp.zeros_like(row) if x.segment is None else x.segment,
    )
    return jnp.stack([a.reshape(a.shape[:2] + (-1,)) for a in rows], axis=2)


def _by_chunk(x: jax.Array, chunk: int) -> jax.Array:
    """`B T H` to `B H N L`."""
    B, _, H = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(B, H, -1, chunk)


def suffix_sum(
    x: jax.Array, leaving: jax.Array, segment: jax.Array | None, reset: jax.Array | None
) -> jax.Array:
    """sum over t >= j of x_t in j's chunk and segment, plus `leaving` where that is the last one.

    Args:
        x: `B H N L`.
        leaving: `B H N`.
        segment: as in `Decays`; None: no resets.
        reset: `B T`; the result is 0 there.
    """
    axis = x.ndim - 1
    if segment is None or reset is None:
        return jax.lax.cumsum(x, axis=axis, reverse=True) + leaving[..., None]
    flags = jnp.broadcast_to(reset[:, None], x.shape[:2] + reset.shape[1:]).reshape(x.shape)
    # A position's sum ends where the next position starts a segment.
    ends = jnp.concatenate([flags[..., 1:], jnp.zeros_like(flags[..., :1])], axis=-1)

    def join(a, b):  # from the last position to the first
        (later, _), (sooner, stops) = a, b
        return jnp.where(stops, sooner, sooner + later), a[1] | stops

    total, _ = jax.lax.associative_scan(join, (x, ends), axis=axis, reverse=True)
    total = total + jnp.where(segment == segment[..., -1:], leaving[..., None], 0)
    return jnp.where(flags, 0, total)


def scale_grads(x: Decays, rho: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradient through m_t = max(log f_t + m_{t-1}, log i_t) of a loss `rho` (`B H`) on the last m.

    It follows the path of the maximum back until an input gate made m. Returns cotangents of log i,
    log f (`B H N L`), and of m before the first step.
    """
    shape = x.kept.shape
    made = (~x.kept).reshape(shape[:2] + (-1,)).astype(jnp.int32)
    count = jax.lax.cumsum(made, axis=2, reverse=True)
    on_path = (count - made == 0).reshape(shape)
    rho = rho[..., None, None]
    through_i = jnp.where(on_path & ~x.through_f, rho, 0)
    through_f = jnp.where(on_path & x.through_f, rho, 0)
    return through_i, through_f, jnp.where(count[..., 0] == 0, rho[..., 0, 0], 0)
