"""The gates of the mLSTM as the kernels read them, and the cotangents of the gates from their sums.

In plain `jnp`, for TPUs and Mosaic GPU; `triton_gates` computes the same in Triton kernels. Gates
are `B T H`, padded to full chunks, or `B H N L` in chunks.

Source: arXiv:2405.04517, appendix; arXiv:2503.14376, section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm.gates import READ_FLOOR, Decays, LogGates
from pallas_kernels.mlstm.options import Backward, Options, Packed


class PackedGates(NamedTuple):
    """The eight gate vectors `B H 8 T` of a kernel; see `stack_forward` and `stack_backward`."""

    coarse: jax.Array
    query: jax.Array
    key: jax.Array
    read: jax.Array
    write: jax.Array
    normalizer: jax.Array
    decay: jax.Array
    segment: jax.Array


COARSE, QUERY, KEY, READ, WRITE, NORMALIZER, DECAY, SEGMENT = range(len(PackedGates._fields))


def forward(options: Options, K: int, gates: LogGates, m_first: jax.Array) -> Packed:
    """The gates of the forward kernels; see `options.Kernels`."""
    decays = _decays(options, gates, m_first)
    return Packed(stack_forward(decays, K), decays.m_start, decays.m_end[..., -1])


def backward(options: Options, K: int, gates: LogGates, m_starts, d, h, dh) -> jax.Array:
    """The gates of a backward kernel that sums h * dh itself; see `options.Kernels`."""
    del h, dh
    decays = _decays(options, gates, m_starts[..., 0])
    if d is None:
        return stack_backward(decays, K, None, jnp.zeros_like(decays.m))
    # The normalizer of every query, and minus the sign with which d enters it, or 0.
    d, bound = d.reshape(decays.m.shape), pre.lower_bound(decays.m)
    norm = jnp.maximum(jnp.abs(d), bound) + options.eps
    return stack_backward(decays, K, norm, jnp.where(jnp.abs(d) > bound, -jnp.sign(d), 0))


def backward_with_sums(options: Options, K: int, gates: LogGates, m_starts, d, h, dh) -> jax.Array:
    """The gates of backward kernels that need the cotangents of normalizers."""
    packed = backward(options, K, gates, m_starts, d, h, dh)
    if d is None:
        return packed
    return packed.at[:, :, NORMALIZER].multiply(inner_products(h, dh, packed.shape[1]))


def gate_grads(
    options: Options, gates: LogGates, grads: Backward, end: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cotangents `B T H` of the log gates for fixed stabilizers; see `options.Kernels`."""
    chunks = pre.in_chunks(gates, options.chunk)
    # log i_s scales the contribution of k_s. log f_j scales all that is carried over step j, so its
    # cotangent is the sum of q dq - k dk from j on, plus the scaling of the end state.
    dlog_i, q_dq = (x.sum(2).reshape(chunks.log_i.shape) for x in (grads.k_dk, grads.q_dq))
    carry = jnp.concatenate([grads.scaling.sum(-1)[..., 1:], end[..., None]], axis=-1)
    segment = None if chunks.reset is None else jnp.cumsum(chunks.reset, axis=-1)
    dlog_f = pre.suffix_sum(q_dq - dlog_i, carry, segment, chunks.reset)
    return by_time(dlog_i), by_time(dlog_f)


def stabilizer_grads(
    options: Options, gates: LogGates, m_starts, d, h, dh, dm_last: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of the log gates, `B T H`, and of the first m, `B H`, through the stabilizers.

    h depends on them through `eps`, which is scaled by e^m; see `api`.

    Args:
        dm_last: `B H`, cotangent of m after the last step, for fixed C and n without e^m.
    """
    chunks = pre.in_chunks(gates, options.chunk)
    m, starts, _ = pre.stabilizers(chunks, m_starts[..., 0], max_state=True)
    through_f, carried = pre.stabilizer_path(chunks, m, starts)
    if options.forget_gate == "exp" and options.normalize:
        norm = jnp.maximum(jnp.abs(d.reshape(m.shape)), pre.lower_bound(m)) + options.eps
        dnorm = inner_products(h, dh, m.shape[1]).reshape(m.shape) / -norm
        dm = jnp.where(m >= READ_FLOOR, options.eps * dnorm, 0)
        chunks_first = jnp.moveaxis(carried, 2, 0), jnp.moveaxis(dm, 2, 0)
        leaving = jnp.moveaxis(pre.end_grads(*chunks_first, dm_last), 0, 2)
        di, df, dm_first = pre.stabilizer_grads(through_f, carried, leaving, dm)
        dm_first = dm_first[..., 0]
    else:
        through_f, carried = (x.reshape(*x.shape[:2], -1) for x in (through_f, carried))
        di, df, dm_first = pre.stabilizer_grads(through_f, carried, dm_last)
    return by_time(di), by_time(df), dm_first


def by_time(x: jax.Array) -> jax.Array:
    """`B H N L` or `B H T` to `B T H`."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1), 1, 2)


def inner_products(h: jax.Array, dh: jax.Array, H: int) -> jax.Array:
    """Sums `B H T` of h * dh, `B T HV`, over the values of each head."""
    products = h.astype(jnp.float32) * dh.astype(jnp.float32)
    # The sum runs over the last axis, before the transpose, so that only the sums are transposed.
    return jnp.swapaxes(products.reshape(*h.shape[:2], H, -1).sum(-1), 1, 2)


def _decays(options: Options, gates: LogGates, m_first: jax.Array) -> Decays:
    gates = pre.in_chunks(gates, options.chunk)
    m = pre.stabilizers(gates, m_first, max_state=options.max_state)
    return pre.decays(gates, *m, forget_gate=options.forget_gate)


def stack_forward(x: Decays, qk_dim: int) -> jax.Array:
    """`PackedGates` of the forward kernel, stacked to `B H 8 T`.

    Scaled by exp(-m) and 1/sqrt(K), the log weight of key s at query t is
    (coarse_t - coarse_s) + (query_t + key_s), and that of the state at the chunk start is
    log read_t. `normalizer` is the lower bound of the normalizer.
    """
    return stack_backward(x, qk_dim, None, pre.lower_bound(x.m))


def stack_backward(x: Decays, qk_dim: int, norm: jax.Array | None, sign: jax.Array) -> jax.Array:
    """`PackedGates` of the backward kernel, stacked to `B H 8 T`: weights are divided by `norm`.

    With that division in the gates the kernel uses cotangents of h unchanged. `normalizer` is
    `sign`: sign * (dh . h) is the cotangent of a query's normalizer, times `norm`.

    Args:
        norm: `B H N L`, the normalizer of each query; None: not divided.
        sign: `B H N L`, minus the sign with which q n enters the normalizer, or 0.
    """
    lift = x.m - jnp.maximum(x.m, READ_FLOOR)
    query = x.fine + x.query + lift - 0.5 * jnp.log(float(qk_dim))
    read = qk_dim**-0.5 * jnp.exp(x.from_start + lift)
    if norm is not None:
        query, read = query - jnp.log(norm), read / norm
    segment = x.segment
    packed = PackedGates(
        coarse=x.coarse,
        query=query,
        key=x.key - x.fine,
        read=read,
        write=jnp.exp(x.to_end),
        normalizer=sign,
        decay=jnp.broadcast_to(jnp.exp(x.across)[..., None], query.shape),
        segment=jnp.zeros_like(query) if segment is None else segment.astype(query.dtype),
    )
    return jnp.stack([a.reshape(a.shape[:2] + (-1,)) for a in packed], axis=2)
