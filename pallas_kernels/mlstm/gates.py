"""Gate arithmetic of the mLSTM in plain `jnp`, shared by the kernels and the forms of XLA.

Positions of a chunk are the last axis; the axes before it are the caller's: `B H N L` for kernels,
one axis of chunks `Z L` for `xlstm_jax.ops`. Everything has the dtype of the log gates.

A running sum of log f is kept in two parts, so that differences of large sums keep their digits;
see `Borders`. A reset is no number in any sum: positions of different segments are masked.

All of it depends on the gates alone, so a kernel needs no running maximum and no scalar recurrence:
m of every position is known before the first product.

Source: arXiv:2405.04517, appendix; arXiv:2503.14376, section 3.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import NEG

TINY = 2.0**-120
"""Lower bound of the normalizer, where exp(-m) has underflowed and the query reads nothing."""

READ_FLOOR = -20.0
"""Lowest log-scale at which the state is read: far below, exp(-m) overflows float32."""

GRID = 2.0**10
"""Steps per unit of the coarse part of a sum: exact in float32 up to 2^14 in magnitude."""


class LogGates(NamedTuple):
    """Gates in log space: `B T H` and, for `reset`, `B T`; in chunks, one shape for all three."""

    log_i: jax.Array  # NEG where masked
    log_f: jax.Array  # 0 where masked
    reset: jax.Array | None  # False where masked


class Borders(NamedTuple):
    """Running sums in chunks, and log decays between a chunk's borders and its positions.

    A sum in two parts keeps the digits of a difference of two large ones. Coarse parts are
    multiples of 1 / GRID: their sums and differences have no rounding error; fine parts stay below
    L / GRID. Measured on 512 steps with gates of scale 8 in float32: the error of h falls from
    1.6e-3 of its maximum to 6e-5, that of the step recurrence.
    """

    coarse: jax.Array  # sum of log f from the chunk's start up to each position, on the grid
    fine: jax.Array  # the rest of that sum
    segment: jax.Array | None  # resets seen in the chunk, up to and including each position
    to_row: jax.Array  # from the chunk's start; NEG once a reset lies between
    to_end: jax.Array  # weight of each position in the state at the chunk's end
    across: jax.Array  # of the state at the start, in the state at the end; one a chunk


class Decays(NamedTuple):
    """Log decays of N chunks, and the log-scale m of every position; `B H N L` unless said."""

    gates: LogGates
    border: Borders
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
    dtype: Any = jnp.float32,
) -> LogGates:
    """Log gates `B T H`; a masked step writes nothing and forgets nothing, whatever it holds."""
    if mask is not None:
        i, f = (jnp.where(mask[..., None], gate, 0) for gate in (i, f))
        reset = None if reset is None else reset & mask
    i, f = i.astype(dtype), f.astype(dtype)
    log_i = i if input_gate == "exp" else -jax.nn.softplus(-i)
    log_f = -jax.nn.softplus(-f)
    if mask is not None:
        log_i = jnp.where(mask[..., None], log_i, NEG)
        log_f = jnp.where(mask[..., None], log_f, 0)
    return LogGates(log_i, log_f, reset)


def without_scale(
    C: jax.Array, n: jax.Array, m: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same state with m = 0."""
    factor = jnp.exp(m)
    return factor[..., None, None] * C, factor[..., None] * n, jnp.zeros_like(m)


def in_chunks(gates: LogGates, L: int) -> LogGates:
    """`B T H` to `B H N L`; the last chunk is padded with steps that write and forget nothing."""
    B, T, H = gates.log_i.shape

    def split(x: jax.Array, fill: float) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -T % L), (0, 0)), constant_values=fill) if T % L else x
        return jnp.swapaxes(x, 1, 2).reshape(B, H, -1, L)

    log_i, log_f = split(gates.log_i, NEG), split(gates.log_f, 0)
    if gates.reset is None:
        return LogGates(log_i, log_f, None)
    return LogGates(log_i, log_f, split(jnp.broadcast_to(gates.reset[..., None], (B, T, H)), 0))


def running_sum(gates: LogGates) -> tuple[jax.Array, jax.Array]:
    """Coarse and fine part of the sum of log f from the chunk's start; a reset adds nothing."""
    log_f = gates.log_f if gates.reset is None else jnp.where(gates.reset, 0, gates.log_f)
    coarse = jnp.round(log_f * GRID) / GRID
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(log_f - coarse, axis=-1)


def borders(gates: LogGates, total: tuple[jax.Array, jax.Array]) -> Borders:
    """Decays from a chunk's start and to its end; `total` is the running sum of its gates."""
    coarse, fine = total
    to_row = coarse + fine
    to_end = (coarse[..., -1:] - coarse) + (fine[..., -1:] + (gates.log_i - fine))
    across = to_row[..., -1]
    if gates.reset is None:
        return Borders(coarse, fine, None, to_row, to_end, across)
    segment = jnp.cumsum(gates.reset, axis=-1)
    to_row = jnp.where(segment == 0, to_row, NEG)
    to_end = jnp.where(segment == segment[..., -1:], to_end, NEG)
    across = jnp.where(segment[..., -1] == 0, across, NEG)
    return Borders(coarse, fine, segment, to_row, to_end, across)


def log_i_for_m(gates: LogGates) -> jax.Array:
    """What the stabilizer sees of each source.

    The initial state that a reset writes has m = 0, so that step ends with max(log f + 0, i).
    """
    if gates.reset is None:
        return gates.log_i
    return jnp.where(gates.reset, jnp.maximum(gates.log_i, gates.log_f), gates.log_i)


def end_max(gates: LogGates, total: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The stabilizer of a chunk's last state, the initial state that a reset writes included."""
    return jnp.max(borders(gates._replace(log_i=log_i_for_m(gates)), total).to_end, axis=-1)


def path_of_maximum(
    gates: LogGates, m: jax.Array, m_start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Where m_t = max(log f_t + m_{t-1}, log i_t) takes the first, and where through an old state.

    Args:
        gates: in chunks.
        m, m_start: after every position, and before the chunk.
    """
    before = jnp.concatenate([m_start[..., None], m[..., :-1]], axis=-1)
    if gates.reset is None:
        through_f = gates.log_f + before >= gates.log_i
        return through_f, through_f
    through_f = gates.log_f + jnp.where(gates.reset, 0, before) >= gates.log_i
    return through_f, through_f & ~gates.reset


def decays(gates: LogGates, m_first: jax.Array, chunk: int, *, max_state: bool) -> Decays:
    """Decays in chunks of `chunk` positions.

    Args:
        gates: `B T H`.
        m_first: `B H`, the log-scale before the first step.
        max_state: whether m follows the gates; else it is 0 everywhere.
    """
    gates = in_chunks(gates, chunk)
    total = running_sum(gates)
    border = borders(gates, total)
    if max_state:
        inside = _inside_maximum(gates, total[0] + total[1])
        m_start, m_end, m = _log_scales(inside, border, m_first)
    else:
        m_start = m_end = jnp.zeros_like(border.across)
        m = jnp.zeros_like(border.to_row)
    return Decays(gates, border, m, m_start, m_end, *path_of_maximum(gates, m, m_start))


def _inside_maximum(gates: LogGates, to_row: jax.Array) -> jax.Array:
    """The largest log weight of a source in each row, from inside the chunk alone."""
    source = log_i_for_m(gates) - to_row
    if gates.reset is None:
        return to_row + jax.lax.cummax(source, axis=source.ndim - 1)

    def join(a, b):
        (x, _), (y, starts) = a, b
        return jnp.where(starts, y, jnp.maximum(x, y)), a[1] | starts

    highest, _ = jax.lax.associative_scan(join, (source, gates.reset), axis=source.ndim - 1)
    return to_row + highest


def _log_scales(inside: jax.Array, border: Borders, m_first: jax.Array):
    """m before and after each chunk and after each position: max(log f_t + m_{t-1}, log i_t)."""

    def join(x, y):
        return x[0] + y[0], jnp.maximum(y[0] + x[1], y[1])

    own = (border.across, inside[..., -1])
    decay, m = jax.lax.associative_scan(join, own, axis=inside.ndim - 2)
    m_end = jnp.maximum(jnp.maximum(decay, NEG) + m_first[..., None], m)
    m_start = jnp.concatenate([m_first[..., None], m_end[..., :-1]], axis=-1)
    return m_start, m_end, jnp.maximum(inside, border.to_row + m_start[..., None])


def forward_rows(x: Decays, qk_dim: int) -> jax.Array:
    """The array `B H 8 T` of the forward kernel, in the order of `Packed`.

    log weight of source s in row t, over e^m and with 1/sqrt(K):
    (coarse_t - coarse_s) + (row_t + source_s); of the state at the chunk's start: log across_t.
    `extra` is the lower bound of the normalizer.
    """
    return backward_rows(x, qk_dim, None, lower_bound(x.m))


def backward_rows(x: Decays, qk_dim: int, norm: jax.Array | None, sign: jax.Array) -> jax.Array:
    """The array `B H 8 T` of the backward kernel: as forward, weights divided by `norm` as well.

    So the kernel reads cotangents of h as they come: times `sign`, in place of the lower bound,
    their product with h is the cotangent of a row's normalizer times `norm`; all `B H N L`.
    """
    coarse, fine, segment, to_row, to_end, across = x.border
    m = jnp.maximum(x.m, READ_FLOOR)
    row = fine - m - 0.5 * jnp.log(float(qk_dim))
    across_row = qk_dim**-0.5 * jnp.exp(to_row + x.m_start[..., None] - m)
    if norm is not None:
        row, across_row = row - jnp.log(norm), across_row / norm
    kept = jnp.exp(across + x.m_start - x.m_end)[..., None]
    rows = Packed(
        coarse=coarse,
        row=row,
        source=x.gates.log_i - fine,
        across=across_row,
        written=jnp.exp(to_end - x.m_end[..., None]),
        extra=sign,
        kept=jnp.broadcast_to(kept, row.shape),
        segment=jnp.zeros_like(row) if segment is None else segment.astype(row.dtype),
    )
    return jnp.stack([a.reshape(a.shape[:2] + (-1,)) for a in rows], axis=2)


class StepFactors(NamedTuple):
    """What one step multiplies with; `B H` each."""

    kept: jax.Array  # the memory
    added: jax.Array  # the key
    bound: jax.Array  # the normalizer is at least this
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
    """What a normalizer is at least: exp(-m), as long as float32 can say it."""
    return jnp.maximum(jnp.exp(-jnp.maximum(m, READ_FLOOR)), TINY)


def suffix_sum(
    x: jax.Array,
    leaving: jax.Array,
    segment: jax.Array | None,
    reset: jax.Array | None = None,
) -> jax.Array:
    """sum over t >= j of x_t in j's chunk and segment, plus `leaving` where that is the last one.

    Args:
        x: `... L`.
        leaving: one number a chunk.
        segment: a count that grows where a segment starts, as in `Borders`; None: one segment.
        reset: `... L`; the result is 0 there.
    """
    if segment is None:
        return jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True) + leaving[..., None]
    L = x.shape[-1]
    later = jnp.triu(jnp.ones((L, L), bool)).reshape((1,) * (x.ndim - 1) + (L, L))
    # Fused into one loop without an array of pairs; a scan would take ten times as long to compile.
    same = later & (segment[..., :, None] == segment[..., None, :])
    total = jnp.sum(jnp.where(same, x[..., None, :], 0), axis=-1)
    total = total + jnp.where(segment == segment[..., -1:], leaving[..., None], 0)
    return total if reset is None else jnp.where(reset, 0, total)


def scale_grads(
    through_f: jax.Array, kept: jax.Array, leaving: jax.Array, dm: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradient through m_t = max(log f_t + m_{t-1}, log i_t), along the path of the maximum.

    Args:
        through_f, kept: of chunks `... L`; see `path_of_maximum`.
        leaving: cotangent of m after each chunk, from what follows it.
        dm: cotangent of m of every position, besides `leaving`; None: zeros.

    Returns cotangents of log i, of log f, and of m before each chunk.
    """
    # The path to t starts anew where m came from i, or from the initial state of a reset.
    segment = jnp.cumsum(~kept, axis=-1)
    if dm is None:
        total = jnp.where(segment == segment[..., -1:], leaving[..., None], 0)
    else:
        total = suffix_sum(dm, leaving, segment)
    before = jnp.where(kept[..., 0], total[..., 0], 0)
    return jnp.where(through_f, 0, total), jnp.where(through_f, total, 0), before
