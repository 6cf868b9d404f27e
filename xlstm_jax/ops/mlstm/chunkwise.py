"""Chunkwise mLSTM: parallel within a chunk, recurrent over the states at chunk boundaries.

Chunks of all sequences and heads share one axis Z = N * B * H, chunk index first: XLA's CPU backend
is fast at loops over three axes. On a mesh, each shard has its own. Y is B * H. `u` is the
unnormalized read-out, `d` its normalizer, both divided by exp(m), where m is the log-scale of the
recurrence.

The gradient is exact and rematerializes the weights of a chunk. The log-scale m of a state is a
gauge: moving a factor between exp(m) and (C, n) changes nothing. So gradients of the gates follow
from scale symmetries (`k_s` appears only as exp(log i_s) k_s, and a state only times the product of
later forget gates), and m itself has a gradient in two places only: eps, which is added in the
scaled domain, and a loss on the returned C, n and m.

Source: arXiv:2503.14376 (tiled flash linear attention), section 3; the gradient is our derivation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm.gates import READ_FLOOR, Decays, LogGates
from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.cpu import materialize
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.gradient import with_backward
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.typing import Array, Float

CHUNK_SIZE = 64
"""Positions per chunk by default."""


class Chunks(NamedTuple):
    """Inputs in chunks."""

    q: Float[Array, "Z L K"]
    k: Float[Array, "Z L K"]
    v: Float[Array, "Z L V"]
    gates: LogGates  # "Z L"


class Outputs(NamedTuple):
    """Results of the forward pass for every position."""

    m: Float[Array, "Z L"]  # log-scale of the recurrence after this step
    d: Float[Array, "Z L"]  # signed normalizer
    h: Float[Array, "Z L V"]


class Residuals(NamedTuple):
    """Values that the forward pass saves for the backward pass."""

    x: Chunks
    outputs: Outputs
    starts: MLSTMState  # at the start of every chunk, leading axis Z
    last: MLSTMState  # leading axis Y = B * H


def mlstm_chunkwise(
    x: Inputs, state: MLSTMState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """The op `mlstm`, for any T; memory grows with T, not with T * chunk_size."""
    q, k, v = (flags.zero_masked(a) for a in x[:3])
    gates = pre.log_gates(x.i, x.f, *flags, **options.gates, dtype=state.C.dtype)
    if not options.max_state:
        # The states of this op have m = 0; the caller's may have another m.
        state = MLSTMState(*pre.fold_stabilizer(*state))
    # A short sequence is one chunk of its own length, without padding.
    L = min(options.chunk_size or CHUNK_SIZE, q.shape[1])
    h, state = _chunkwise(options, L, q, k, v, gates, state)
    # A masked position writes nothing, but its query still reads the state.
    return flags.zero_masked(h), state


def _forward(options: Options, L: int, q, k, v, gates: LogGates, state: MLSTMState):
    B, T, H = q.shape[:3]
    # The last chunk is padded with steps that write and forget nothing.
    log_i, log_f = materialize((_chunk(gates.log_i, L, fill=pre.NEG), _chunk(gates.log_f, L)))
    reset = gates.reset
    if reset is not None:
        reset = _chunk(jnp.broadcast_to(reset[..., None], (B, T, H)), L)
    x = Chunks(_chunk(q, L), _chunk(k, L), _chunk(v, L), LogGates(log_i, log_f, reset))
    # An operand of products, and possibly a broadcast constant: see `materialize`.
    initial = materialize(jax.tree.map(_merge_leading, state))
    m = _stabilizers(options, x.gates, initial.m)
    decays = materialize(pre.decays(x.gates, *m, forget_gate=options.forget_gate))
    starts, last = _boundary_states(x, decays, initial)
    outputs = _outputs(options, x, decays, starts)
    last_by_head = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), last, state)
    return (_join(outputs.h, B, T, H), last_by_head), Residuals(x, outputs, starts, last)


def _backward(options: Options, L: int, residuals: Residuals, cotangents):
    x, outputs, starts, last = residuals
    dh, dlast_by_head = cotangents
    B, T, H = dh.shape[:3]
    dh, dlast = _chunk(dh, L), materialize(jax.tree.map(_merge_leading, dlast_by_head))
    # dh may be a broadcast constant (see `materialize`), unless it is divided by norms first.
    if not options.normalize:
        dh = materialize(dh)
    m_end = jnp.concatenate([starts.m[last.m.size :], last.m])
    m = outputs.m, starts.m, m_end
    decays = materialize(pre.decays(x.gates, *m, forget_gate=options.forget_gate))
    doutputs = _output_grads(options, outputs, dh)
    weights = _query_weights(decays)
    dends, phi, dinitial = _boundary_grads(residuals, decays, doutputs, weights[1], dlast)
    dq, dk, dv = _input_grads(options, x, decays, starts, doutputs, weights, dends)
    # exp(log i_s) k_s is one factor, so dlog_i = k dk. log f_j is in the weights of pairs (t, s)
    # with s < j <= t: those of queries t >= j (q dq) minus those of keys s >= j (k dk).
    dlog_i = jnp.sum(x.k * dk, axis=-1)
    flow = jnp.sum(x.q * dq, axis=-1) - dlog_i
    dlog_f = pre.suffix_sum(flow, phi, decays.segment, x.gates.reset)
    if options.max_state:
        # The gradient of the loss on the last state through m: C and n have the factor exp(-m).
        rho = dlast.m - _inner(dlast, last)
        through_f, through_m = pre.stabilizer_path(x.gates, outputs.m, starts.m)
        leaving = pre.end_grads(through_m, doutputs.m, rho).reshape(-1)
        gauge_i, gauge_f, gauge_m = pre.stabilizer_grads(through_f, through_m, leaving, doutputs.m)
        dlog_i, dlog_f = dlog_i + gauge_i, dlog_f + gauge_f
        dinitial = dinitial._replace(m=dinitial.m + _by_position(gauge_m, last)[0])
    dq, dk, dv = dq.astype(x.q.dtype), dk.astype(x.k.dtype), dv.astype(x.v.dtype)
    dq, dk, dv, dlog_i, dlog_f = (_join(g, B, T, H) for g in (dq, dk, dv, dlog_i, dlog_f))
    dinitial = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), dinitial, dlast_by_head)
    return dq, dk, dv, LogGates(dlog_i, dlog_f, None), dinitial


_chunkwise = with_backward(_forward, _backward, num_static=2)


def _stabilizers(options: Options, gates: LogGates, m_first: Float[Array, "Y"]):
    """`stabilizers` with the leading axis Z."""
    by_sequence = jax.tree.map(lambda x: x.reshape(-1, m_first.size, x.shape[-1]), gates)
    m = pre.stabilizers(by_sequence, m_first, max_state=options.max_state, chunk_axis=0)
    return materialize(tuple(_merge_leading(x) for x in m))


def _boundary_states(x: Chunks, decays: Decays, state: MLSTMState):
    """The states at chunk starts, leading axis Z, and the last; `state` has the leading axis Y."""
    # Increments are computed for all chunks at once; the scan only scales and adds.
    keys = jnp.exp(decays.to_end)[..., None] * x.k
    C_new = exact_einsum("ZLK,ZLV->ZKV", keys.astype(x.v.dtype), x.v, dtype=state.C.dtype)
    n_new = jnp.sum(keys, axis=-2)
    chunks = jnp.exp(decays.across), decays.m_end, C_new, n_new

    def step(state, chunk):
        f_scaled, m, C_new, n_new = chunk
        C = f_scaled[..., None, None] * state.C + C_new
        n = f_scaled[..., None] * state.n + n_new
        return MLSTMState(C, n, m), state

    last, starts = jax.lax.scan(step, state, tuple(_by_position(a, state) for a in chunks))
    return jax.tree.map(_merge_leading, starts), last


def _outputs(options: Options, x: Chunks, decays: Decays, starts: MLSTMState) -> Outputs:
    dtype, scale, m = starts.C.dtype, x.q.shape[-1] ** -0.5, decays.m
    within, across = _query_weights(decays)
    P = scale * exact_einsum("ZLK,ZSK->ZLS", x.q, x.k, dtype=dtype) * within
    q = (scale * across)[..., None] * x.q
    # Products take operands in the dtype of v and accumulate in that of the state.
    u = exact_einsum("ZLS,ZSV->ZLV", P.astype(x.v.dtype), x.v, dtype=dtype)
    C = starts.C.astype(x.v.dtype)
    u = u + exact_einsum("ZLK,ZKV->ZLV", q.astype(x.v.dtype), C, dtype=dtype)
    if not options.normalize:
        return Outputs(m, jnp.zeros_like(m), u.astype(x.v.dtype))
    d = jnp.sum(P, axis=-1) + jnp.sum(q * starts.n[..., None, :], axis=-1)
    norm, _ = _normalizer(options, m, d)
    return Outputs(m, d, (u / norm[..., None]).astype(x.v.dtype))


class _OutputGrads(NamedTuple):
    """Cotangents of a position's read-out `u`, of its normalizer `d`, and of its log-scale `m`."""

    u: Float[Array, "Z L V"]
    d: Float[Array, "Z L"]
    m: Float[Array, "Z L"]


def _output_grads(options: Options, outputs: Outputs, dh: Float[Array, "Z L V"]) -> _OutputGrads:
    dtype = outputs.m.dtype
    dh = dh.astype(dtype)
    if not options.normalize:
        return _OutputGrads(dh, jnp.zeros_like(outputs.d), jnp.zeros_like(outputs.m))
    norm, is_d = _normalizer(options, outputs.m, outputs.d)
    dnorm = -jnp.sum(dh * outputs.h.astype(dtype), axis=-1) / norm
    # eps is added in the scaled domain: in units of the unscaled state it is eps * exp(m).
    dm = jnp.where(outputs.m >= READ_FLOOR, options.eps * dnorm, 0)
    return _OutputGrads(dh / norm[..., None], jnp.where(is_d, jnp.sign(outputs.d) * dnorm, 0), dm)


def _boundary_grads(residuals: Residuals, decays: Decays, doutputs: _OutputGrads, across, dlast):
    """Cotangents of the states after each chunk, of a scaling of them, and of the initial state."""
    x, _, starts, last = residuals
    dtype = starts.C.dtype
    q_across = (x.q.shape[-1] ** -0.5 * across)[..., None] * x.q
    dC_read = exact_einsum(
        "ZLK,ZLV->ZKV", q_across.astype(x.v.dtype), _as(doutputs.u, x.v), dtype=dtype
    )
    dn_read = jnp.sum(q_across * doutputs.d[..., None], axis=-2)
    f_scaled = jnp.exp(decays.across)

    def step(carry, chunk):
        dC, dn, phi = carry
        f_scaled, dC_read, dn_read, C, n = chunk
        dC_start = f_scaled[..., None, None] * dC + dC_read
        dn_start = f_scaled[..., None] * dn + dn_read
        phi_start = jnp.sum(dC_start * C, axis=(-2, -1)) + jnp.sum(dn_start * n, axis=-1)
        return (dC_start, dn_start, phi_start), carry

    carry = (dlast.C, dlast.n, _inner(dlast, last))
    xs = tuple(_by_position(a, last) for a in (f_scaled, dC_read, dn_read, starts.C, starts.n))
    (dC, dn, dm), (dC_end, dn_end, phi) = jax.lax.scan(step, carry, xs, reverse=True)
    dC_end, dn_end, phi = (_merge_leading(a) for a in (dC_end, dn_end, phi))
    return (dC_end, dn_end), phi, MLSTMState(dC, dn, dm)


def _input_grads(
    options, x: Chunks, decays: Decays, starts, doutputs: _OutputGrads, weights, dends
):
    dtype, scale = starts.C.dtype, x.q.shape[-1] ** -0.5
    (within, across), (dC_end, dn_end) = weights, dends
    C, dC_end = _as(starts.C, x.v), _as(dC_end, x.v)
    du = _as(doutputs.u, x.v)
    to_end = jnp.exp(decays.to_end)
    within = scale * within
    # Scores are rematerialized: L x L per chunk, they are not among the residuals.
    dS = (exact_einsum("ZLV,ZSV->ZLS", du, x.v, dtype=dtype) + doutputs.d[..., None]) * within
    P = exact_einsum("ZLK,ZSK->ZLS", x.q, x.k, dtype=dtype) * within
    dS, P = _as(dS, x.v), _as(P, x.v)
    dq_start = exact_einsum("ZLV,ZKV->ZLK", du, C, dtype=dtype)
    if options.normalize:
        dq_start = dq_start + doutputs.d[..., None] * starts.n[..., None, :]
    dq = exact_einsum("ZLS,ZSK->ZLK", dS, x.k, dtype=dtype) + (scale * across)[..., None] * dq_start
    dk_end = exact_einsum("ZSV,ZKV->ZSK", x.v, dC_end, dtype=dtype) + dn_end[..., None, :]
    dk = exact_einsum("ZLS,ZLK->ZSK", dS, x.q, dtype=dtype) + to_end[..., None] * dk_end
    keys = _as(to_end[..., None] * x.k, x.v)
    dv = exact_einsum("ZLS,ZLV->ZSV", P, du, dtype=dtype)
    dv = dv + exact_einsum("ZSK,ZKV->ZSV", keys, dC_end, dtype=dtype)
    return dq, dk, dv


def _inner(cotangent: MLSTMState, state: MLSTMState) -> Float[Array, "Y"]:
    """Cotangent of the log of a common factor of C and n."""
    C = jnp.sum(cotangent.C * state.C, axis=(-2, -1))
    return C + jnp.sum(cotangent.n * state.n, axis=-1)


def _query_weights(decays: Decays) -> tuple[Float[Array, "Z L L"], Float[Array, "Z L"]]:
    """For every query: weights of keys, and of the state at the chunk's start, divided by e^m."""
    L, segment = decays.m.shape[-1], decays.segment
    visible = jnp.tril(jnp.ones((L, L), bool))[None]
    if segment is not None:
        visible = visible & (segment[..., :, None] == segment[..., None, :])
    lift = decays.m - jnp.maximum(decays.m, READ_FLOOR)
    # Coarse parts are subtracted first: their difference is exact, see `Decays`.
    coarse = decays.coarse[..., :, None] - decays.coarse[..., None, :]
    query, key = decays.fine + decays.query + lift, decays.key - decays.fine
    source = coarse + (query[..., :, None] + key[..., None, :])
    within = jnp.exp(jnp.where(visible, source, pre.NEG))
    return within, jnp.exp(decays.from_start + lift)


def _normalizer(options: Options, m: Float[Array, "Z L"], d: Float[Array, "Z L"]):
    """The divisor of every read-out, and whether it is |d| (else the bound: no gradient to d)."""
    bound = pre.lower_bound(m)
    return jnp.maximum(jnp.abs(d), bound) + options.eps, jnp.abs(d) > bound


def _chunk(x: Array, L: int, fill: float = 0) -> Array:
    """`B T H ...` to `Z L ...`, with Z = N * B * H; the last chunk is padded with `fill`."""
    B, T, H = x.shape[:3]
    pad = -T % L
    if pad:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    x = x.reshape((B, -1, L, H) + x.shape[3:])
    # The chunk index first, so that a scan over chunks needs a reshape only.
    x = jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))
    return x.reshape((-1, L) + x.shape[4:])


def _join(x: Array, B: int, T: int, H: int) -> Array:
    """`Z L ...` to `B T H ...`, without the padding of the last chunk."""
    x = x.reshape((-1, B, H) + x.shape[1:])
    x = jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))
    return x.reshape((B, -1, H) + x.shape[4:])[:, :T]


def _by_position(x: Array, state: MLSTMState) -> Array:
    """`Z ...` to `N Y ...`: chunk index, and sequences with their heads."""
    return x.reshape((-1,) + state.m.shape + x.shape[1:])


def _merge_leading(x: Array) -> Array:
    """The first two axes as one: the inverse of `_by_position`, or `B H ...` to `Y ...`."""
    return x.reshape((-1,) + x.shape[2:])


def _as(x: Array, like: Array) -> Array:
    return x.astype(like.dtype)
