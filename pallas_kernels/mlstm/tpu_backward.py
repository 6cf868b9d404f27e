"""mLSTM backward on a TPU: one pass over the chunks, from the last to the first.

The weights of a chunk are recomputed once and transposed (keys along the first axis, queries along
the second), so that only one product transposes an operand. Plain JAX computes the gradients of the
gates from the per-position sums that the kernel returns. Cotangents of h are used unchanged: the
gates include the division by the normalizer.

Source of the forward pass: arXiv:2503.14376, section 3.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.mlstm import cost, packing
from pallas_kernels.mlstm.options import Backward, Options
from pallas_kernels.mlstm.tpu_forward import (
    IN_HBM,
    block_specs,
    concatenate,
    log_weights,
    weighted_sum,
)
from pallas_kernels.tpu import product, to_lanes

K_DK, Q_DQ, SCALING = range(3)


def mlstm_backward(
    options: Options, packed, q, k, v, h, dh, C_starts, n_starts, dC, dn
) -> Backward:
    """The backward kernel; see `options.Kernels`."""
    B, H, _, T = packed.shape
    K, V = dC.shape[2:]
    block = options.chunk * options.tile.chunks_per_block
    limit = options.tile.vmem_limit(K, V, v.dtype)
    last = T // block - 1

    tokens, fixed, starts, by_time = block_specs(options, lambda c: last - c)
    outputs = [] if h is None else [h]
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    # K_DK, Q_DQ and SCALING, padded to four sums.
    float32 = [(B, H, 4, T), dC.shape, dn.shape]
    dq, dk, dv, sums, dC, dn = pl.pallas_call(
        functools.partial(_kernel, options),
        grid=(B, H, T // block),
        in_specs=[
            *(by_time(8), tokens(K), tokens(K), tokens(V), tokens(V)),
            *(tokens(V) for _ in outputs),
            *(starts(K, V), starts(1, K), IN_HBM, fixed(1, K)),
        ],
        out_specs=[tokens(K), tokens(K), tokens(V), by_time(4), fixed(K, V), fixed(1, K)],
        out_shape=[*inputs, *(jax.ShapeDtypeStruct(x, jnp.float32) for x in float32)],
        compiler_params=tpu.compiler_params(tpu.DIMENSION_SEMANTICS, limit),
        cost_estimate=cost.backward(options, B, T, H, K, V, q.dtype),
        interpret=options.interpret,
        metadata=options.metadata(),
        name="mlstm_backward",
    )(packed, q, k, v, dh, *outputs, C_starts, n_starts, dC, dn)
    # The kernel leaves one partial sum per lane, in the first lanes of each chunk.
    scaling = sums[:, :, SCALING].reshape(B, H, -1, options.chunk)[..., : options.lanes]
    k_dk, q_dq = (sums[:, :, index : index + 1] for index in (K_DK, Q_DQ))
    return Backward(dq, dk, dv, k_dk, q_dq, scaling, dC, dn)


class _Refs(NamedTuple):
    """Refs of the blocks that the kernel reads and writes."""

    packed: jax.Ref
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

    def gate(self, index: int, positions: slice) -> jax.Array:
        """One gate of these positions, `1 L`."""
        return self.packed[0, 0, index : index + 1, positions]

    def sublane_gates(self, positions: slice) -> jax.Array:
        """All gates of these positions, `L 8`."""
        return self.packed[0, 0, :, positions].T


def _kernel(options: Options, *refs):
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
        dnorm = {s.start: _normalizer_cotangent(options, x, s) for s in strips if has_h}
        # Keys first: dk and dv use the tiles of dS as they are computed; dq reads them later.
        dS_tiles = {}
        for keys in strips:
            _key_grads(options, x, chunk, keys, dnorm, dS_tiles)
        for queries in strips:
            _query_grads(options, x, index, chunk, queries, dnorm, dS_tiles)
        _update(options, x, index, chunk, list(dnorm.values()))


def _normalizer_cotangent(options: Options, x: _Refs, strip: slice) -> tuple[jax.Array, jax.Array]:
    """Cotangent of each query's normalizer, times the normalizer: as `L 1` and as `1 L`."""
    assert x.h is not None
    dh, h = (ref[0, strip].astype(jnp.float32) for ref in (x.dh, x.h))
    sign = x.sublane_gates(strip)[:, packing.NORMALIZER : packing.NORMALIZER + 1]
    dnorm = sign * jnp.sum(options.fold_lanes(dh * h), axis=1, keepdims=True)
    return dnorm, to_lanes(dnorm)


def _key_grads(options: Options, x: _Refs, chunk: slice, keys: slice, dnorm: dict, dS_tiles: dict):
    """dk and dv of one strip of keys; stores the tiles of dS in `dS_tiles`."""
    k, v = x.k[0, keys], x.v[0, keys]
    key_gates = x.sublane_gates(keys)
    P, dS = [], []
    for queries in options.strips(chunk):
        if queries.start < keys.start:
            continue
        log_D = log_weights(
            options, key_gates, x.packed[0, 0, :, queries], on_diagonal=queries == keys, upper=True
        )
        D = jnp.exp(log_D)
        P.append((product(k, x.q[0, queries], (1, 1)) * D).astype(v.dtype))
        dP = product(v, x.dh[0, queries], (1, 1))
        dP = dP + dnorm[queries.start][1] if dnorm else dP
        dS.append((dP * D).astype(v.dtype))
        dS_tiles[queries.start, keys.start] = dS[-1]
    write = key_gates[:, packing.WRITE : packing.WRITE + 1]
    later = slice(keys.start, chunk.stop)
    dC = x.dC[0, 0].astype(v.dtype)
    dv = write * product(k, dC) + product(concatenate(P, 1), x.dh[0, later])
    x.dv[0, keys] = dv.astype(v.dtype)
    through_state = product(v, dC, (1, 1)) + x.dn[0, 0]
    dk = write * through_state + product(concatenate(dS, 1), x.q[0, later])
    x.dk[0, keys] = dk.astype(k.dtype)
    x.sums[0, 0, K_DK : K_DK + 1, keys] = _inner_products(options, k, dk)


def _query_grads(
    options: Options,
    x: _Refs,
    index: int,
    chunk: slice,
    queries: slice,
    dnorm: dict,
    dS_tiles: dict,
):
    """dq of one strip of queries."""
    q, dh = x.q[0, queries], x.dh[0, queries]
    read = x.sublane_gates(queries)[:, packing.READ : packing.READ + 1]
    dS = [tile for (start, _), tile in dS_tiles.items() if start == queries.start]
    through_state = product(dh, x.C_starts[0, 0, index].astype(dh.dtype), (1, 1))
    if dnorm:
        through_state = through_state + dnorm[queries.start][0] * x.n_starts[0, 0, index]
    causal = slice(chunk.start, queries.stop)
    dq = read * through_state + product(concatenate(dS, 0), x.k[0, causal], (0, 0))
    x.dq[0, queries] = dq.astype(q.dtype)
    x.sums[0, 0, Q_DQ : Q_DQ + 1, queries] = _inner_products(options, q, dq)


def _update(options: Options, x: _Refs, index: int, chunk: slice, dnorm: list):
    """Cotangents of the state before the chunk, and of its log scale."""
    read = x.gate(packing.READ, chunk)
    decay = x.gate(packing.DECAY, slice(chunk.start, chunk.start + 1))
    q = x.q[0, chunk]
    weighted = (q.T.astype(jnp.float32) * read).astype(q.dtype)
    dC = decay * x.dC[0, 0] + product(weighted, x.dh[0, chunk])
    x.dC[0, 0] = dC
    dn = decay * x.dn[0, 0]
    if dnorm:
        dn = dn + weighted_sum(read * concatenate([lanes for _, lanes in dnorm], 1), q)
    x.dn[0, 0] = dn
    scaling = dC * x.C_starts[0, 0, index].astype(jnp.float32)
    scaling = jnp.sum(options.fold_lanes(scaling), axis=0, keepdims=True)
    scaling = scaling + options.fold_lanes(dn * x.n_starts[0, 0, index])
    lanes = slice(chunk.start, chunk.start + scaling.shape[1])
    x.sums[0, 0, SCALING : SCALING + 1, lanes] = scaling


def _inner_products(options: Options, x: jax.Array, dx: jax.Array) -> jax.Array:
    """Sums of x * dx over the last axis, `1 L`."""
    return to_lanes(jnp.sum(options.fold_lanes(x.astype(jnp.float32) * dx), axis=1, keepdims=True))
