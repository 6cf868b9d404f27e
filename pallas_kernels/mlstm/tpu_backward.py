"""mLSTM backward on a TPU: one pass over the chunks from the last to the first.

The square of a chunk is recomputed once, transposed (keys down, queries across), so that only one
product needs its operand turned. What is left to plain JAX are sums over single numbers per
position. Cotangents of h are read as they come: their division by the normalizer is in the gates.

Source of the forward pass: arXiv:2503.14376, section 3.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.mlstm import cost, gates
from pallas_kernels.mlstm.options import Backward, Options
from pallas_kernels.mlstm.tpu_forward import IN_HBM, block_specs, joined, log_weights, row_product
from pallas_kernels.tpu import as_row, product

K_DK, Q_DQ, SCALING = range(3)


def mlstm_backward(options: Options, rows, q, k, v, h, dh, C_starts, n_starts, dC, dn) -> Backward:
    """Cotangents of one call; see `options.Kernels`."""
    B, H, _, T = rows.shape
    K, V = dC.shape[2:]
    span = options.chunk * options.tile.chunks_per_block
    limit = options.tile.vmem_limit(K, V, v.dtype)
    last = T // span - 1

    tokens, fixed, starts, by_time = block_specs(options, lambda c: last - c)
    outputs = [] if h is None else [h]
    memory = [(B, H, 4, T), dC.shape, dn.shape]
    same = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    dq, dk, dv, sums, dC, dn = pl.pallas_call(
        functools.partial(_body, options),
        grid=(B, H, T // span),
        in_specs=[
            *(by_time(8), tokens(K), tokens(K), tokens(V), tokens(V)),
            *(tokens(V) for _ in outputs),
            *(starts(K, V), starts(1, K), IN_HBM, fixed(1, K)),
        ],
        out_specs=[tokens(K), tokens(K), tokens(V), by_time(4), fixed(K, V), fixed(1, K)],
        out_shape=[*same, *(jax.ShapeDtypeStruct(x, jnp.float32) for x in memory)],
        compiler_params=tpu.compiler_params(tpu.IN_ORDER, limit),
        cost_estimate=cost.backward(options, B, T, H, K, V, q.dtype),
        interpret=options.interpret,
        metadata=options.metadata(),
        name="mlstm_backward",
    )(rows, q, k, v, dh, *outputs, C_starts, n_starts, dC, dn)
    # The sum over a whole state is left spread over the first lanes of its chunk.
    scaling = sums[:, :, SCALING].reshape(B, H, -1, options.chunk)[..., : options.lanes]
    return Backward(dq, dk, dv, sums[:, :, K_DK], sums[:, :, Q_DQ], scaling.sum(-1), dC, dn)


class _Refs(NamedTuple):
    """References to the blocks that the kernel reads and writes."""

    rows: jax.Ref
    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    dh: jax.Ref
    h: jax.Ref | None
    C_starts: jax.Ref
    n_starts: jax.Ref
    dC_last: jax.Ref
    dn_last: jax.Ref
    dq: jax.Ref
    dk: jax.Ref
    dv: jax.Ref
    sums: jax.Ref
    dC: jax.Ref
    dn: jax.Ref

    def row(self, index: int, positions: slice) -> jax.Array:
        """`1 L`: one kind of gate."""
        return self.rows[0, 0, index : index + 1, positions]

    def column(self, positions: slice) -> jax.Array:
        """`L 8`: all gates of these positions."""
        return self.rows[0, 0, :, positions].T


def _body(options: Options, *refs):
    has_h = options.normalize
    x = _Refs._make(refs if has_h else (*refs[:5], None, *refs[5:]))
    b, head, block = (pl.program_id(axis) for axis in range(3))

    @pl.when(block == 0)
    def _():
        pltpu.sync_copy(x.dC_last.at[b, head], x.dC.at[0, 0])
        x.dn[...] = x.dn_last[...]

    for index in reversed(range(options.tile.chunks_per_block)):
        chunk = slice(index * options.chunk, (index + 1) * options.chunk)
        strips = options.strips(chunk)
        extra = {s.start: _normalizer_cotangent(options, x, s) for s in strips if has_h}
        # Keys first: the products of the square are consumed while they are made.
        squares = {}
        for source in strips:
            _keys(options, x, chunk, source, extra, squares)
        for strip in strips:
            _queries(options, x, index, chunk, strip, extra, squares)
        _update(options, x, index, chunk, list(extra.values()))


def _normalizer_cotangent(options: Options, x: _Refs, strip: slice) -> tuple[jax.Array, jax.Array]:
    """The cotangent of a row's normalizer, times the normalizer: as a column and as a row."""
    assert x.h is not None
    dh, h = (ref[0, strip].astype(jnp.float32) for ref in (x.dh, x.h))
    sign = x.column(strip)[:, gates.EXTRA : gates.EXTRA + 1]
    column = sign * jnp.sum(options.folded(dh * h), axis=1, keepdims=True)
    return column, as_row(column)


def _keys(options: Options, x: _Refs, chunk: slice, source: slice, extra: dict, squares: dict):
    """dk and dv of one strip of keys; leaves the cotangents of the square in `squares`."""
    k, v = x.k[0, source], x.v[0, source]
    column = x.column(source)
    P, dS = [], []
    for strip in options.strips(chunk):
        if strip.start < source.start:
            continue
        weights = log_weights(
            options, column, x.rows[0, 0, :, strip], on_diagonal=strip == source, upper=True
        )
        D = jnp.exp(weights)
        P.append((product(k, x.q[0, strip], (1, 1)) * D).astype(v.dtype))
        dP = product(v, x.dh[0, strip], (1, 1))
        dP = dP + extra[strip.start][1] if extra else dP
        dS.append((dP * D).astype(v.dtype))
        squares[strip.start, source.start] = dS[-1]
    written = column[:, gates.WRITTEN : gates.WRITTEN + 1]
    later = slice(source.start, chunk.stop)
    dC = x.dC[0, 0].astype(v.dtype)
    dv = written * product(k, dC) + product(joined(P, 1), x.dh[0, later])
    x.dv[0, source] = dv.astype(v.dtype)
    through_state = product(v, dC, (1, 1)) + x.dn[0, 0]
    dk = written * through_state + product(joined(dS, 1), x.q[0, later])
    x.dk[0, source] = dk.astype(k.dtype)
    x.sums[0, 0, K_DK : K_DK + 1, source] = _row_sums(options, k, dk)


def _queries(
    options: Options, x: _Refs, index: int, chunk: slice, strip: slice, extra: dict, squares: dict
):
    """dq of one strip of queries."""
    q, dh = x.q[0, strip], x.dh[0, strip]
    across = x.column(strip)[:, gates.ACROSS : gates.ACROSS + 1]
    dS = [square for (start, _), square in squares.items() if start == strip.start]
    read = product(dh, x.C_starts[0, 0, index].astype(dh.dtype), (1, 1))
    read = read + extra[strip.start][0] * x.n_starts[0, 0, index] if extra else read
    seen = slice(chunk.start, strip.stop)
    dq = across * read + product(joined(dS, 0), x.k[0, seen], (0, 0))
    x.dq[0, strip] = dq.astype(q.dtype)
    x.sums[0, 0, Q_DQ : Q_DQ + 1, strip] = _row_sums(options, q, dq)


def _update(options: Options, x: _Refs, index: int, chunk: slice, extra: list):
    """The cotangent of the memory before the chunk, and what scaling that memory costs."""
    across = x.row(gates.ACROSS, chunk)
    kept = x.row(gates.KEPT, slice(chunk.start, chunk.start + 1))
    q = x.q[0, chunk]
    weighted = (q.T.astype(jnp.float32) * across).astype(q.dtype)
    dC = kept * x.dC[0, 0] + product(weighted, x.dh[0, chunk])
    x.dC[0, 0] = dC
    dn = kept * x.dn[0, 0]
    if extra:
        dn = dn + row_product(across * joined([row for _, row in extra], 1), q)
    x.dn[0, 0] = dn
    scaling = dC * x.C_starts[0, 0, index].astype(jnp.float32)
    scaling = jnp.sum(options.folded(scaling), axis=0, keepdims=True)
    scaling = scaling + options.folded(dn * x.n_starts[0, 0, index])
    lanes = slice(chunk.start, chunk.start + scaling.shape[1])
    x.sums[0, 0, SCALING : SCALING + 1, lanes] = scaling


def _row_sums(options: Options, x: jax.Array, dx: jax.Array) -> jax.Array:
    """The sum of x * dx over the last axis, as a row."""
    return as_row(jnp.sum(options.folded(x.astype(jnp.float32) * dx), axis=1, keepdims=True))
