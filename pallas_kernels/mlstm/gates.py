"""Gate arithmetic of the mLSTM in plain `jnp`, shared by the kernels and the XLA implementations.

The last axis is the positions of a chunk; leading axes are up to the caller: `B H N L` for kernels,
one axis of chunks `Z L` for `xlstm_jax.ops`. All arrays have the dtype of the log gates.

Running sums of log f are stored in two parts, so that differences of large sums do not cancel; see
`LogDecays`. Resets do not enter any sum; pairs of positions in different segments are masked.

Everything here depends on the gates alone. m of every position is known before the first matrix
product, so kernels need no running maximum and no scalar recurrence.

Source: arXiv:2405.04517, appendix; arXiv:2503.14376, section 3.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import NEG

TINY = 2.0**-120
"""Lower bound of the normalizer where exp(-m) underflows and q n is 0."""

READ_FLOOR = -20.0
"""Lower limit of m in a read-out: far below it, exp(-m) overflows float32."""

GRID = 2.0**10
"""Coarse parts are multiples of 1 / GRID, which float32 represents exactly up to 2^14."""


class LogGates(NamedTuple):
    """Gates in log space: `B T H`, `reset` is `B T`; after `in_chunks` all have one shape."""

    log_i: jax.Array  # NEG where masked
    log_f: jax.Array  # 0 where masked
    reset: jax.Array | None  # False where masked


class LogDecays(NamedTuple):
    """Running sums of log f, and log decays between chunk boundaries and positions; `... L`.

    Each sum is stored in two parts, so that the difference of two large sums does not cancel.
    Coarse parts are multiples of 1 / GRID: their sums and differences have no rounding error; fine
    parts stay below L / GRID. Measured on 512 steps with gates of scale 8 in float32: the error of
    h falls from 1.6e-3 of its maximum to 6e-5, that of the step recurrence.
    """

    coarse: jax.Array  # sum of log f from the chunk start to each position, rounded to the grid
    fine: jax.Array  # remainder of that sum
    segment: jax.Array | None  # number of resets in the chunk up to and including each position
    from_start: jax.Array  # decay from the chunk start to each position; NEG after a reset
    to_end: jax.Array  # log weight of each position in the state at the chunk end
    across: jax.Array  # `...`: decay from the chunk start to its end; NEG after a reset


class Decays(NamedTuple):
    """Log decays of N chunks and the stabilizer m of every position, `B H N L`."""

    gates: LogGates
    log_decays: LogDecays
    m: jax.Array  # after each position
    m_start: jax.Array  # `B H N`: before the chunk
    m_end: jax.Array  # `B H N`: after the chunk
    through_f: jax.Array  # bool: m_t is log f_t + m_{t-1}, not log i_t
    carried: jax.Array  # bool: m_t depends on m_{t-1}, that is through_f without a reset


class PackedGates(NamedTuple):
    """The eight gate vectors `B H 8 T` of a kernel; see `pack_forward` and `pack_backward`."""

    coarse: jax.Array
    query: jax.Array
    key: jax.Array
    read: jax.Array
    write: jax.Array
    normalizer: jax.Array
    decay: jax.Array
    segment: jax.Array


COARSE, QUERY, KEY, READ, WRITE, NORMALIZER, DECAY, SEGMENT = range(len(PackedGates._fields))


def log_gates(
    i: jax.Array,
    f: jax.Array,
    reset: jax.Array | None,
    mask: jax.Array | None,
    *,
    input_gate: str,
    dtype: Any = jnp.float32,
) -> LogGates:
    """Log gates `B T H`; a masked step leaves the state unchanged, even if its inputs are NaN."""
    if mask is not None:
        # Before the nonlinearities, so that masked NaNs do not reach their gradients.
        i, f = (jnp.where(mask[..., None], gate, 0) for gate in (i, f))
        reset = None if reset is None else reset & mask
    i, f = i.astype(dtype), f.astype(dtype)
    log_i = i if input_gate == "exp" else -jax.nn.softplus(-i)
    log_f = -jax.nn.softplus(-f)
    if mask is not None:
        log_i = jnp.where(mask[..., None], log_i, NEG)
        log_f = jnp.where(mask[..., None], log_f, 0)
    return LogGates(log_i, log_f, reset)


def fold_stabilizer(
    C: jax.Array, n: jax.Array, m: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Multiplies exp(m) into C and n: the same state with m = 0."""
    factor = jnp.exp(m)
    return factor[..., None, None] * C, factor[..., None] * n, jnp.zeros_like(m)


def in_chunks(gates: LogGates, L: int) -> LogGates:
    """`B T H` to `B H N L`; the last chunk is padded with steps that leave the state unchanged."""
    B, T, H = gates.log_i.shape

    def split(x: jax.Array, padding: float) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -T % L), (0, 0)), constant_values=padding) if T % L else x
        return jnp.swapaxes(x, 1, 2).reshape(B, H, -1, L)

    log_i, log_f = split(gates.log_i, NEG), split(gates.log_f, 0)
    if gates.reset is None:
        return LogGates(log_i, log_f, None)
    return LogGates(log_i, log_f, split(jnp.broadcast_to(gates.reset[..., None], (B, T, H)), 0))


def running_sum(gates: LogGates) -> tuple[jax.Array, jax.Array]:
    """Cumulative sum of log f in each chunk, as (coarse, fine); a reset counts as log f = 0."""
    log_f = gates.log_f if gates.reset is None else jnp.where(gates.reset, 0, gates.log_f)
    coarse = jnp.round(log_f * GRID) / GRID
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(log_f - coarse, axis=-1)


def log_decays(gates: LogGates, total: tuple[jax.Array, jax.Array]) -> LogDecays:
    """Decays from each chunk's start and to its end; `total` is the `running_sum` of `gates`."""
    coarse, fine = total
    from_start = coarse + fine
    # The difference of the coarse parts is exact; the small parts are summed before it is added.
    to_end = (coarse[..., -1:] - coarse) + (fine[..., -1:] + (gates.log_i - fine))
    across = from_start[..., -1]
    if gates.reset is None:
        return LogDecays(coarse, fine, None, from_start, to_end, across)
    segment = jnp.cumsum(gates.reset, axis=-1)
    from_start = jnp.where(segment == 0, from_start, NEG)
    to_end = jnp.where(segment == segment[..., -1:], to_end, NEG)
    across = jnp.where(segment[..., -1] == 0, across, NEG)
    return LogDecays(coarse, fine, segment, from_start, to_end, across)


def log_i_for_m(gates: LogGates) -> jax.Array:
    """The log input gates that enter the running maximum of m.

    A reset installs the initial state, whose m is 0, so m after that step is max(log f + 0, log i).
    """
    if gates.reset is None:
        return gates.log_i
    return jnp.where(gates.reset, jnp.maximum(gates.log_i, gates.log_f), gates.log_i)


def end_max(gates: LogGates, total: tuple[jax.Array, jax.Array]) -> jax.Array:
    """m at the end of each chunk from its own positions alone, resets to m = 0 included."""
    return jnp.max(log_decays(gates._replace(log_i=log_i_for_m(gates)), total).to_end, axis=-1)


def stabilizer_path(
    gates: LogGates, m: jax.Array, m_start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which argument attains m_t = max(log f_t + m_{t-1}, log i_t); ties go to the first.

    Args:
        gates: in chunks.
        m, m_start: m after every position, and before each chunk.

    Returns:
        `through_f` and `carried`, as in `Decays`.
    """
    before = jnp.concatenate([m_start[..., None], m[..., :-1]], axis=-1)
    if gates.reset is None:
        through_f = gates.log_f + before >= gates.log_i
        return through_f, through_f
    through_f = gates.log_f + jnp.where(gates.reset, 0, before) >= gates.log_i
    return through_f, through_f & ~gates.reset


def decays(gates: LogGates, m_first: jax.Array, chunk: int, *, max_state: bool) -> Decays:
    """Log decays and stabilizers in chunks of `chunk` positions.

    Args:
        gates: `B T H`.
        m_first: `B H`, m before the first step.
        chunk: L, positions in a chunk.
        max_state: whether m is the running maximum; else it is 0 everywhere.
    """
    gates = in_chunks(gates, chunk)
    total = running_sum(gates)
    logs = log_decays(gates, total)
    if max_state:
        chunk_max = _chunk_max(gates, total[0] + total[1])
        m_start, m_end, m = _stabilizers(chunk_max, logs, m_first)
    else:
        m_start = m_end = jnp.zeros_like(logs.across)
        m = jnp.zeros_like(logs.from_start)
    return Decays(gates, logs, m, m_start, m_end, *stabilizer_path(gates, m, m_start))


def _chunk_max(gates: LogGates, from_start: jax.Array) -> jax.Array:
    """The largest log weight of any key at each query, from the positions of the chunk alone."""
    key = log_i_for_m(gates) - from_start
    if gates.reset is None:
        return from_start + jax.lax.cummax(key, axis=key.ndim - 1)

    def join(a, b):
        (x, _), (y, starts) = a, b
        return jnp.where(starts, y, jnp.maximum(x, y)), a[1] | starts

    # A cumulative maximum that restarts at every reset.
    largest, _ = jax.lax.associative_scan(join, (key, gates.reset), axis=key.ndim - 1)
    return from_start + largest


def _stabilizers(chunk_max: jax.Array, logs: LogDecays, m_first: jax.Array):
    """m before and after each chunk and after each position: max(log f_t + m_{t-1}, log i_t)."""

    def join(x, y):
        return x[0] + y[0], jnp.maximum(y[0] + x[1], y[1])

    chunks = (logs.across, chunk_max[..., -1])
    decay, m = jax.lax.associative_scan(join, chunks, axis=chunk_max.ndim - 2)
    m_end = jnp.maximum(jnp.maximum(decay, NEG) + m_first[..., None], m)
    m_start = jnp.concatenate([m_first[..., None], m_end[..., :-1]], axis=-1)
    return m_start, m_end, jnp.maximum(chunk_max, logs.from_start + m_start[..., None])


def pack_forward(x: Decays, qk_dim: int) -> jax.Array:
    """`PackedGates` of the forward kernel, stacked to `B H 8 T`.

    Scaled by exp(-m) and 1/sqrt(K), the log weight of key s at query t is
    (coarse_t - coarse_s) + (query_t + key_s), and that of the state at the chunk start is
    log read_t. `normalizer` is the lower bound of the normalizer.
    """
    return pack_backward(x, qk_dim, None, lower_bound(x.m))


def pack_backward(x: Decays, qk_dim: int, norm: jax.Array | None, sign: jax.Array) -> jax.Array:
    """`PackedGates` of the backward kernel, stacked to `B H 8 T`: weights are divided by `norm`.

    With that division in the gates the kernel uses cotangents of h unchanged. `normalizer` is
    `sign`: sign * (dh . h) is the cotangent of a query's normalizer, times `norm`.

    Args:
        norm: `B H N L`, the normalizer of each query; None: not divided.
        sign: `B H N L`, minus the sign with which q n enters the normalizer, or 0.
    """
    coarse, fine, segment, from_start, to_end, across = x.log_decays
    m = jnp.maximum(x.m, READ_FLOOR)
    query = fine - m - 0.5 * jnp.log(float(qk_dim))
    read = qk_dim**-0.5 * jnp.exp(from_start + x.m_start[..., None] - m)
    if norm is not None:
        query, read = query - jnp.log(norm), read / norm
    decay = jnp.exp(across + x.m_start - x.m_end)[..., None]
    packed = PackedGates(
        coarse=coarse,
        query=query,
        key=x.gates.log_i - fine,
        read=read,
        write=jnp.exp(to_end - x.m_end[..., None]),
        normalizer=sign,
        decay=jnp.broadcast_to(decay, query.shape),
        segment=jnp.zeros_like(query) if segment is None else segment.astype(query.dtype),
    )
    return jnp.stack([a.reshape(a.shape[:2] + (-1,)) for a in packed], axis=2)


class StepFactors(NamedTuple):
    """Factors of one step, `B H` each."""

    decay: jax.Array  # multiplies the old state
    write: jax.Array  # multiplies the key
    bound: jax.Array  # lower bound of the normalizer
    read: jax.Array  # multiplies the query


def step_factors(
    gates: LogGates, m: jax.Array, *, max_state: bool
) -> tuple[StepFactors, jax.Array]:
    """Factors of a step from its gates `B 1 H` and the m before it; also returns the new m."""
    log_i, log_f = gates.log_i[:, 0], gates.log_f[:, 0]
    decay = log_f + m
    carried_m = decay
    if gates.reset is not None:
        reset = gates.reset  # B 1, broadcast over heads
        decay, carried_m = jnp.where(reset, NEG, decay), jnp.where(reset, log_f, decay)
    m = jnp.maximum(carried_m, log_i) if max_state else jnp.zeros_like(m)
    # States are read with m at least READ_FLOOR; the factor of the query makes up the difference.
    read = jnp.exp(m - jnp.maximum(m, READ_FLOOR))
    return StepFactors(jnp.exp(decay - m), jnp.exp(log_i - m), lower_bound(m), read), m


def lower_bound(m: jax.Array) -> jax.Array:
    """Lower bound of the normalizer: exp(-m), limited to what float32 can represent."""
    return jnp.maximum(jnp.exp(-jnp.maximum(m, READ_FLOOR)), TINY)


def suffix_sum(
    x: jax.Array,
    carry: jax.Array,
    segment: jax.Array | None,
    reset: jax.Array | None = None,
) -> jax.Array:
    """For each position j the sum of x_t over t >= j in the same chunk and segment.

    Args:
        x: `... L`.
        carry: one number per chunk, added to the sums of the chunk's last segment.
        segment: segment index of each position, as in `LogDecays`; None: one segment.
        reset: `... L`; where True, the result is 0.
    """
    if segment is None:
        return jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True) + carry[..., None]
    L = x.shape[-1]
    later = jnp.triu(jnp.ones((L, L), bool)).reshape((1,) * (x.ndim - 1) + (L, L))
    # XLA fuses this without materializing `... L L`; a scan takes ten times as long to compile.
    same = later & (segment[..., :, None] == segment[..., None, :])
    total = jnp.sum(jnp.where(same, x[..., None, :], 0), axis=-1)
    total = total + jnp.where(segment == segment[..., -1:], carry[..., None], 0)
    return total if reset is None else jnp.where(reset, 0, total)


def stabilizer_grads(
    through_f: jax.Array, carried: jax.Array, dm_end: jax.Array, dm: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Backward pass of m_t = max(log f_t + m_{t-1}, log i_t).

    Args:
        through_f, carried: `... L`, from `stabilizer_path`.
        dm_end: cotangent of m at the end of each chunk, from later chunks.
        dm: `... L`, cotangent of m at every position, without `dm_end`; None: zeros.

    Returns:
        Cotangents of log i, of log f, and of m before each chunk.
    """
    # A new path starts where m_t comes from log i or, at a reset, from the initial state.
    segment = jnp.cumsum(~carried, axis=-1)
    if dm is None:
        total = jnp.where(segment == segment[..., -1:], dm_end[..., None], 0)
    else:
        total = suffix_sum(dm, dm_end, segment)
    before = jnp.where(carried[..., 0], total[..., 0], 0)
    return jnp.where(through_f, 0, total), jnp.where(through_f, total, 0), before
