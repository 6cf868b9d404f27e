"""mLSTM backward on a TPU: one pass over the chunks from the last to the first.

The square of a chunk is recomputed once, transposed (keys down, queries across), so that only one
product needs its operand turned. What is left to plain JAX are sums over single numbers per
position. Cotangents of h are read as they come: their division by the normaliser is in the gates.

The derivation is that of `xlstm_jax.ops.mlstm_backward`; forward pass: arXiv:2503.14376.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import common
from pallas_kernels.common import as_row, product
from pallas_kernels.mlstm import cost, gates
from pallas_kernels.mlstm.options import Options
from pallas_kernels.mlstm.tpu_forward import folded, joined, log_weights, row_product


class Backward(NamedTuple):
    """Results of the backward kernel; dC and dn are those of the memory before the first step."""

    q: jax.Array  # B T HK
    k: jax.Array  # B T HK
    v: jax.Array  # B T HV
    k_dk: jax.Array  # B H T, the sum of k * dk per position
    q_dq: jax.Array  # B H T
    scaling: jax.Array  # B H N, what scaling the state before each chunk costs
    C: jax.Array  # B H K V
    n: jax.Array  # B H 1 K


K_DK, Q_DQ, SCALING = range(3)


def mlstm_backward(
    options: Options,
    rows: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dh: jax.Array,
    C_starts: jax.Array,
    n_starts: jax.Array,
    dC: jax.Array,
    dn: jax.Array,
) -> Backward:
    """Cotangents of one call.

    Args:
        rows: `B H 8 T`, of `gates.backward_rows`.
        q, k, v, dh: `B T HK`, `B T HK`, `B T HV`, `B T HV`, as in the forward kernel.
        C_starts, n_starts: `B H N K V` and `B H N 1 K`, states at chunk starts.
        dC, dn: `B H K V` and `B H 1 K`, float32: cotangents of the memory after the last step.
    """
    B, H, _, T = rows.shape
    K, V = dC.shape[2:]
    span = options.chunk * options.chunks_per_block
    last = T // span - 1

    def tokens(width):
        return pl.BlockSpec((1, span, width), lambda b, h, c: (b, last - c, h))

    def fixed(*shape):
        return pl.BlockSpec((1, 1, *shape), lambda b, h, c: (b, h, 0, 0))

    def starts(*shape):
        block = (1, 1, options.chunks_per_block, *shape)
        return pl.BlockSpec(block, lambda b, h, c: (b, h, last - c, 0, 0))

    def by_time(count):
        return pl.BlockSpec((1, 1, count, span), lambda b, h, c: (b, h, 0, last - c))

    same = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    dq, dk, dv, sums, dC, dn = pl.pallas_call(
        functools.partial(_body, options),
        grid=(B, H, T // span),
        in_specs=[
            by_time(8),
            tokens(K),
            tokens(K),
            tokens(V),
            tokens(V),
            starts(K, V),
            starts(1, K),
            pl.BlockSpec(memory_space=pl.ANY),
            fixed(1, K),
        ],
        out_specs=[tokens(K), tokens(K), tokens(V), by_time(4), fixed(K, V), fixed(1, K)],
        out_shape=[
            *same,
            jax.ShapeDtypeStruct((B, H, 4, T), jnp.float32),
            jax.ShapeDtypeStruct(dC.shape, jnp.float32),
            jax.ShapeDtypeStruct(dn.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=options.vmem_bytes,
        ),
        cost_estimate=cost.backward(options, B, T, H, K, V, q.dtype),
        interpret=common.interpreter(),
        name="mlstm_backward",
    )(rows, q, k, v, dh, C_starts, n_starts, dC, dn)
    scaling = sums[:, :, SCALING].reshape(B, H, -1, options.chunk)[..., : _sum_width(options)]
    return Backward(dq, dk, dv, sums[:, :, K_DK], sums[:, :, Q_DQ], scaling.sum(-1), dC, dn)


def _sum_width(options: Options) -> int:
    """Lanes that the sum over a whole state is spread over."""
    return min(common.lanes(), options.chunk)


def _body(
    options: Options,
    rows,
    q,
    k,
    v,
    dh,
    C_starts,
    n_starts,
    dC_last,
    dn_last,
    dq,
    dk,
    dv,
    sums,
    dC,
    dn,
):
    b, head, block = (pl.program_id(axis) for axis in range(3))

    @pl.when(block == 0)
    def _():
        pltpu.sync_copy(dC_last.at[b, head], dC.at[0, 0])
        dn[...] = dn_last[...]

    for index in reversed(range(options.chunks_per_block)):
        chunk = slice(index * options.chunk, (index + 1) * options.chunk)
        # Keys first: the products of the square are consumed while they are made.
        squares = {}
        for source in options.strips(chunk):
            _keys(options, chunk, source, rows, q, k, v, dh, dC, dn, dk, dv, sums, squares)
        C, n = C_starts[0, 0, index], n_starts[0, 0, index]
        for strip in options.strips(chunk):
            _queries(options, chunk, strip, rows, q, k, dh, C, n, dq, sums, squares)
        _update(options, chunk, rows, q, dh, C, n, dC, dn, sums)


def _keys(
    options: Options, chunk, source, rows, q_ref, k_ref, v_ref, dh_ref, dC, dn, dk, dv, sums, squares
):
    """dk and dv of one strip of keys; leaves the cotangents of the square in `squares`."""
    k, v = k_ref[0, source], v_ref[0, source]
    column = rows[0, 0, :, source].T
    weights = []
    for strip in options.strips(chunk):
        if strip.start < source.start:
            continue
        row = rows[0, 0, :, strip]
        x = log_weights(options, column, row, strip == source, upper=True)
        D = jnp.exp(x)
        weights.append((product(k, q_ref[0, strip], (1, 1)) * D).astype(v.dtype))
        dP = product(v, dh_ref[0, strip], (1, 1))
        if options.normalize:
            dP = dP + row[gates.EXTRA : gates.EXTRA + 1]
        squares[strip.start, source.start] = (dP * D).astype(v.dtype)
    written = column[:, gates.WRITTEN : gates.WRITTEN + 1]
    later = slice(source.start, chunk.stop)
    dC_end = dC[0, 0].astype(v.dtype)
    dv_found = written * product(k, dC_end) + product(joined(weights, 1), dh_ref[0, later])
    dv[0, source] = dv_found.astype(dv.dtype)
    through_state = product(v, dC_end, (1, 1)) + dn[0, 0]
    dS = [square for (_, start), square in squares.items() if start == source.start]
    dk_found = written * through_state + product(joined(dS, 1), q_ref[0, later])
    dk[0, source] = dk_found.astype(dk.dtype)
    sums[0, 0, K_DK : K_DK + 1, source] = _row_sums(k, dk_found)


def _queries(options: Options, chunk, strip, rows, q_ref, k_ref, dh_ref, C, n, dq, sums, squares):
    """dq of one strip of queries."""
    column = rows[0, 0, :, strip].T
    across = column[:, gates.ACROSS : gates.ACROSS + 1]
    dS = [square for (start, _), square in squares.items() if start == strip.start]
    seen = slice(chunk.start, strip.stop)
    read = product(dh_ref[0, strip], C.astype(dh_ref.dtype), (1, 1))
    if options.normalize:
        read = read + column[:, gates.EXTRA : gates.EXTRA + 1] * n
    dq_found = across * read + product(joined(dS, 0), k_ref[0, seen], (0, 0))
    dq[0, strip] = dq_found.astype(dq.dtype)
    sums[0, 0, Q_DQ : Q_DQ + 1, strip] = _row_sums(q_ref[0, strip], dq_found)


def _update(options: Options, chunk, rows, q_ref, dh_ref, C, n, dC, dn, sums):
    """The cotangent of the memory before the chunk, and what scaling that memory costs."""
    across = rows[0, 0, gates.ACROSS : gates.ACROSS + 1, chunk]
    kept = rows[0, 0, gates.KEPT : gates.KEPT + 1, chunk.start : chunk.start + 1]
    q = q_ref[0, chunk]
    weighted = (q.T.astype(jnp.float32) * across).astype(q.dtype)
    dC_start = kept * dC[0, 0] + product(weighted, dh_ref[0, chunk])
    dC[0, 0] = dC_start
    dn_start = kept * dn[0, 0]
    if options.normalize:
        extra = rows[0, 0, gates.EXTRA : gates.EXTRA + 1, chunk]
        dn_start = dn_start + row_product(across * extra, q)
    dn[0, 0] = dn_start
    scaling = jnp.sum(folded(dC_start * C.astype(jnp.float32)), axis=0, keepdims=True)
    lanes = slice(chunk.start, chunk.start + _sum_width(options))
    sums[0, 0, SCALING : SCALING + 1, lanes] = scaling + folded(dn_start * n)


def _row_sums(x: jax.Array, dx: jax.Array) -> jax.Array:
    """The sum of x * dx over the last axis, as a row."""
    return as_row(jnp.sum(folded(x.astype(jnp.float32) * dx), axis=1, keepdims=True))
