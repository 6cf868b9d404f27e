"""Gate arithmetic of the mLSTM in plain `jnp`, shared by the kernels and the XLA implementations.

The last axis is the positions of a chunk; leading axes are up to the caller: `B H N L` for kernels,
one axis of chunks `Z L` for `xlstm_jax.ops`. All arrays have the dtype of the log gates.

Exponents are relative to the stabilizer m, as in the recurrence, so no sum cancels, whatever the
gates are; see `Decays`. Pairs of positions in different segments are masked.

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

LARGE = 2.0**12
"""Stabilizers above this are rounded as in the recurrence: log f may be lost in log f + m."""


class LogGates(NamedTuple):
    """Gates in log space: `B T H`, `reset` is `B T`; after `in_chunks` all have one shape."""

    log_i: jax.Array  # NEG where masked
    log_f: jax.Array  # 0 where masked
    reset: jax.Array | None  # False where masked


class Decays(NamedTuple):
    """Log weights in chunks, relative to the stabilizer m; `... L` except where noted.

    Step t multiplies the state by exp(g_t) with g_t = log f_t + m_{t-1} - m_t <= 0. A g below
    `closed(dtype)` has the exponential 0 and is clipped to it, so running sums of g stay small and
    have the same digits for forget gates of -1e9 as for ordinary ones. Each sum has two parts:
    coarse parts are multiples of 1 / grid, whose sums and differences are exact; fine parts stay
    below L / grid. m enters them rounded to the grid, and `query` adds the remainder.
    """

    gates: LogGates
    coarse: jax.Array  # sum of g from the chunk start to each position, rounded to the grid
    fine: jax.Array  # remainder of that sum
    key: jax.Array  # log i - m, with m rounded
    query: jax.Array  # m rounded - m
    segment: jax.Array | None  # number of resets in the chunk up to and including each position
    from_start: jax.Array  # of the state before the chunk, at each position; NEG after a reset
    to_end: jax.Array  # of each position, in the state after the chunk
    m: jax.Array  # after each position
    m_start: jax.Array  # `...`: before the chunk
    m_end: jax.Array  # `...`: after the chunk

    @property
    def across(self) -> jax.Array:
        """`...`: log weight of the state before the chunk in the state after it."""
        return self.from_start[..., -1]


def log_gates(
    i: jax.Array,
    f: jax.Array,
    reset: jax.Array | None,
    mask: jax.Array | None,
    *,
    input_gate: str,
    forget_gate: str,
    dtype: Any = jnp.float32,
) -> LogGates:
    """Log gates `B T H`; a masked step leaves the state unchanged, even if its inputs are NaN."""
    if mask is not None:
        # Before the nonlinearities, so that masked NaNs do not reach their gradients.
        i, f = (jnp.where(mask[..., None], gate, 0) for gate in (i, f))
        reset = None if reset is None else reset & mask
    i, f = i.astype(dtype), f.astype(dtype)
    log_i = i if input_gate == "exp" else -jax.nn.softplus(-i)
    log_f = f if forget_gate == "exp" else -jax.nn.softplus(-f)
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


def stabilizers(
    gates: LogGates, m_first: jax.Array, *, max_state: bool, chunk_axis: int = -1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """m_t = max(log f_t + m_{t-1}, log i_t), with m = 0 before the step of a reset.

    Sums run forward in time, without differences, so gates may be -inf.

    Args:
        gates: in chunks, `... L`.
        m_first: before the first chunk; `...` without the axis of the chunks.
        max_state: whether m is this maximum; else it is 0 everywhere.
        chunk_axis: the axis of `...` that counts the chunks of a sequence.

    Returns:
        m after every position, `... L`, before every chunk and after it, `...`.
    """
    if not max_state:
        m = jnp.zeros_like(gates.log_i)
        return m, m[..., 0], m[..., 0]
    log_f, log_i = gates.log_f, gates.log_i
    if gates.reset is not None:
        log_i = jnp.where(gates.reset, jnp.maximum(log_i, log_f), log_i)
        log_f = jnp.where(gates.reset, -jnp.inf, log_f)

    decay, inside = _compose_steps(log_f, log_i, log_f.ndim - 1)
    axis = chunk_axis % (log_f.ndim - 1)
    total, m_end = _compose_steps(decay[..., -1], inside[..., -1], axis)
    first = jnp.expand_dims(m_first, axis)
    m_end = jnp.maximum(jnp.maximum(total + first, m_end), NEG)
    m_start = jnp.concatenate([first, jax.lax.slice_in_dim(m_end, 0, -1, axis=axis)], axis=axis)
    return jnp.maximum(jnp.maximum(inside, decay + m_start[..., None]), NEG), m_start, m_end


def _compose_steps(decay: jax.Array, m: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Composes the maps x -> max(decay_t + x, m_t) of all steps up to each one.

    By doubling and not by `jax.lax.associative_scan`: the gradient of that in a sequence-sharded
    call crashes the compiler of jaxlib 0.11.2 on a CPU. Both take the same time.
    """
    distance = 1
    while distance < decay.shape[axis]:
        m = jnp.maximum(decay + _shift(m, -jnp.inf, distance, axis), m)
        decay = decay + _shift(decay, 0, distance, axis)
        distance *= 2
    return decay, m


def _shift(x: jax.Array, fill: float, distance: int, axis: int) -> jax.Array:
    """x at `distance` positions before each one, or `fill`."""
    padding = [(distance * (n == axis), 0, 0) for n in range(x.ndim)]
    padded = jax.lax.pad(x, jnp.asarray(fill, x.dtype), padding)
    return jax.lax.slice_in_dim(padded, 0, x.shape[axis], axis=axis)


def stabilizer_path(
    gates: LogGates, m: jax.Array, m_start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which argument attains m_t = max(log f_t + m_{t-1}, log i_t); ties go to the first.

    Args:
        gates: in chunks.
        m, m_start: m after every position, and before each chunk.

    Returns:
        `through_f`: m_t is log f_t + m_{t-1}. `carried`: also without a reset, so m_t depends on
        m_{t-1}.
    """
    before = jnp.concatenate([m_start[..., None], m[..., :-1]], axis=-1)
    if gates.reset is None:
        through_f = gates.log_f + before >= gates.log_i
        return through_f, through_f
    through_f = gates.log_f + jnp.where(gates.reset, 0, before) >= gates.log_i
    return through_f, through_f & ~gates.reset


def decays(
    gates: LogGates, m: jax.Array, m_start: jax.Array, m_end: jax.Array, *, forget_gate: str
) -> Decays:
    """Log weights of gates in chunks, `... L`, relative to their `stabilizers`."""
    steps, rounded, start = relative_steps(gates, m, m_start, forget_gate=forget_gate)
    coarse, fine = (jnp.cumsum(part, axis=-1) for part in steps)
    key, query = jnp.maximum(gates.log_i, NEG) - rounded, rounded - m
    from_start = coarse + (fine + query + (m_start - start)[..., None])
    # The difference of the coarse parts is exact; the small parts are summed before it is added.
    to_end = (coarse[..., -1:] - coarse) + (fine[..., -1:] + query[..., -1:] + (key - fine))
    segment = None
    if gates.reset is not None:
        segment = jnp.cumsum(gates.reset, axis=-1)
        from_start = jnp.where(segment == 0, from_start, NEG)
        to_end = jnp.where(segment == segment[..., -1:], to_end, NEG)
    return Decays(gates, coarse, fine, key, query, segment, from_start, to_end, m, m_start, m_end)


def relative_steps(
    gates: LogGates, m: jax.Array, m_start: jax.Array, *, forget_gate: str
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
    """Coarse and fine part of g of every step, see `Decays`, and m and `m_start`, rounded."""
    L = m.shape[-1]
    rounded, start = _round(m, grid(L)), _round(m_start, grid(L))
    before = jnp.concatenate([start[..., None], rounded[..., :-1]], axis=-1)
    exact = None
    if forget_gate == "exp":
        exact = jnp.concatenate([m_start[..., None], m[..., :-1]], axis=-1), m
    return _steps(gates, before, rounded, grid(L), exact), rounded, start


def grid(L: int) -> float:
    """Coarse parts are multiples of 1 / grid: sums of L such numbers above -128 are exact."""
    return min(2.0**10, 2.0**17 / 2 ** (L - 1).bit_length())


def closed(dtype: Any) -> float:
    """A log weight whose exponential is 0 in this dtype."""
    return -1024.0 if dtype == jnp.float64 else -128.0


def _steps(
    gates: LogGates,
    before: jax.Array,
    m: jax.Array,
    grid: float,
    exact: tuple[jax.Array, jax.Array] | None,
):
    """log f + before - m of every step, clipped at `closed`, as (coarse, fine).

    With an exponential forget gate, `exact` are `before` and `m` before they are rounded.
    """
    total = (gates.log_f + before) - m
    coarse = _round(gates.log_f, grid)
    is_small = jnp.abs(before) < LARGE
    if exact is not None:
        is_sum, step = _growing_steps(gates, *exact)
        is_small &= is_sum & (m < LARGE)
        rounding = jax.lax.stop_gradient((before - exact[0]) - (m - exact[1]))
        total = jnp.where(is_small, total, step + rounding)
    fine = jnp.where(is_small, gates.log_f - coarse, total - _round(total, grid))
    coarse = jnp.where(is_small, coarse + (before - m), _round(total, grid))
    is_closed = total <= closed(total.dtype)
    if gates.reset is not None:
        is_closed |= gates.reset
    return jnp.where(is_closed, closed(total.dtype), coarse), jnp.where(is_closed, 0, fine)


def _growing_steps(gates: LogGates, before: jax.Array, m: jax.Array):
    """Whether m is near the maximum of this step alone, and log f + before minus that maximum.

    m of `stabilizers` is rounded in sums of many log f, which may be large. The maximum of the step
    is `log f + before`, exactly, or larger: as in the recurrence, no step lets the state grow.
    """
    carried = gates.log_f + jax.lax.stop_gradient(before)
    m_step = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(carried, gates.log_i), NEG))
    return jnp.abs(m - m_step) < 1, carried - m_step


def _round(x: jax.Array, grid: float) -> jax.Array:
    return jnp.round(x * grid) / grid


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
    m = jnp.maximum(jnp.maximum(carried_m, log_i), NEG) if max_state else jnp.zeros_like(m)
    # States are read with m at least READ_FLOOR; the factor of the query makes up the difference.
    read = jnp.exp(m - jnp.maximum(m, READ_FLOOR))
    return StepFactors(jnp.exp(decay - m), jnp.exp(log_i - m), lower_bound(m), read), m


def lower_bound(m: jax.Array) -> jax.Array:
    """Lower bound of the normalizer: exp(-m), limited to what float32 can represent."""
    return jnp.maximum(jnp.exp(-jnp.maximum(m, READ_FLOOR)), TINY)


def prefix_sum(x: jax.Array, reset: jax.Array | None) -> jax.Array:
    """For each position the sum of x, `... L`, since the last reset, whose own x does not count."""
    if reset is None:
        return jnp.cumsum(x, axis=-1)
    L, segment = x.shape[-1], jnp.cumsum(reset, axis=-1)
    earlier = jnp.tril(jnp.ones((L, L), bool)).reshape((1,) * (x.ndim - 1) + (L, L))
    # XLA fuses this without materializing `... L L`. No difference of running sums: the gradient
    # of one document has no rounding errors of another.
    same = earlier & (segment[..., :, None] == segment[..., None, :])
    return jnp.sum(jnp.where(same, jnp.where(reset, 0, x)[..., None, :], 0), axis=-1)


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
        segment: segment index of each position, as in `Decays`; None: one segment.
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


def end_grads(carried: jax.Array, dm: jax.Array, rho: jax.Array) -> jax.Array:
    """Cotangent of m after each chunk, from later chunks: `N ...`.

    Args:
        carried: `(N ...) L`, whether m_t depends on m_{t-1}; the chunk index first.
        dm: `(N ...) L`, cotangent of m at every position.
        rho: `...`, that of the last m.
    """
    entering = jnp.sum(jnp.where(jnp.cumsum(~carried, axis=-1) == 0, dm, 0), axis=-1)

    def step(leaving, chunk):
        is_carried, entering = chunk
        return entering + jnp.where(is_carried, leaving, 0), leaving

    chunks = (a.reshape(-1, *rho.shape) for a in (jnp.all(carried, axis=-1), entering))
    return jax.lax.scan(step, rho, tuple(chunks), reverse=True)[1]


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
