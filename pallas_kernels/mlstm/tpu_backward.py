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

from pallas_kernels.mlstm import cost, packing
from pallas_kernels.mlstm.options import Backward, Options
from pallas_kernels.mlstm.tpu_forward import (
    block_specs,
    compiler_params,
    concatenate,
    first_state,
    log_weights,
    start_carry,
    weighted_sum,
)
from pallas_kernels.mlstm.tpu_layout import Heads
from pallas_kernels.tpu import product, to_lanes

K_DK, Q_DQ, SCALING = range(3)


def mlstm_backward(
    options: Options,
    packed,
    q,
    k,
    v,
    h: jax.Array | None,
    dh,
    C_starts,
    n_starts,
    dC: jax.Array | None,
    dn: jax.Array | None,
) -> Backward:
    """The backward kernel; see `options.Kernels`."""
    B, H, _, T = packed.shape
    heads = Heads.of(options.lanes, H, q, v)
    K, V, groups = heads.qk_width, heads.v_width, H // heads.num
    block = options.chunk * options.tile.chunks_per_block
    last = T // block - 1
    carry = (B, groups, K, heads.V), (B, groups, 1, K)

    tokens, fixed, starts, by_time = block_specs(options, heads, lambda c: last - c)
    outputs = [] if h is None else [h]
    first, first_specs = first_state(dC, dn, carry)
    # K_DK, Q_DQ and SCALING, padded to four sums.
    results = [*((x.shape, x.dtype) for x in (q, k, v)), ((B, H, 4, T), jnp.float32)]
    specs, scratch = [tokens(K), tokens(K), tokens(V), by_time(4)], []
    if options.zero_state:
        scratch = [pltpu.VMEM((1, 1, *shape[2:]), jnp.float32) for shape in carry]
    else:
        results += [(shape, jnp.float32) for shape in carry]
        specs += [fixed(K, heads.V), fixed(1, K)]
    dq, dk, dv, sums, *dstate = pl.pallas_call(
        functools.partial(_kernel, options, heads),
        grid=(B, groups, T // block),
        in_specs=[
            *(by_time(8), tokens(K), tokens(K), tokens(V), tokens(V)),
            *(tokens(V) for _ in outputs),
            *(starts(K, heads.V), starts(1, K), *first_specs),
        ],
        out_specs=specs,
        out_shape=[jax.ShapeDtypeStruct(*result) for result in results],
        scratch_shapes=scratch,
        compiler_params=compiler_params(options, heads, v.dtype),
        cost_estimate=cost.backward(options, heads, B, T, H, q.dtype, given=dC is not None),
        interpret=options.interpret,
        metadata=options.metadata(),
        name="mlstm_backward",
    )(packed, q, k, v, dh, *outputs, C_starts, n_starts, *first)
    # The kernel leaves one partial sum per lane, in the first lanes of each chunk.
    scaling = sums[:, :, SCALING].reshape(B, H, -1, options.chunk)[..., : options.lanes]
    dC, dn = None, None
    if dstate:
        dC, dn = dstate[0].reshape(B, H, heads.K, heads.V), dstate[1].reshape(B, H, 1, heads.K)
    k_dk, q_dq = (sums[:, :, index : index + 1] for index in (K_DK, Q_DQ))
    return Backward(dq, dk, dv, k_dk, q_dq, scaling, dC, dn)


class _Refs(NamedTuple):
    """Refs of the blocks that the kernel reads and writes; dC and dn are the carry."""

    packed: jax.Ref
    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    dh: jax.Ref
    h: jax.Ref | None
    C_starts: jax.Ref
    n_starts: jax.Ref
    dq: jax.Ref
    dk: jax.Ref
    dv: jax.Ref
    sums: jax.Ref
    dC: jax.Ref
    dn: jax.Ref

    def gate(self, head: int, index: int, positions: slice) -> jax.Array:
        """One gate of these positions, `1 L`."""
        return self.packed[0, head, index : index + 1, positions]

    def sublane_gates(self, head: int, positions: slice) -> jax.Array:
        """All gates of these positions, `L 8`."""
        return self.packed[0, head, :, positions].T


NUM_OUTPUTS = 6
"""The last refs of the kernel: gradients, sums and the carry."""


def _kernel(options: Options, heads: Heads, *refs):
    has_h = options.normalize
    inputs, results = list(refs[:-NUM_OUTPUTS]), refs[-NUM_OUTPUTS:]
    if not has_h:
        inputs.insert(5, None)
    first = inputs[8:]
    x = _Refs(*inputs[:8], *results)
    start_carry(x.dC, x.dn, first)
    for index in reversed(range(options.tile.chunks_per_block)):
        chunk = slice(index * options.chunk, (index + 1) * options.chunk)
        strips = options.strips(chunk)
        dnorms = []
        for head in heads.indices:
            dnorm = {}
            if has_h:
                dnorm = {s.start: _normalizer_cotangent(options, heads, x, head, s) for s in strips}
            # Keys first: dk and dv use the tiles of dS as they are computed; dq reads them later.
            dS_tiles = {}
            for keys in strips:
                _key_grads(options, heads, x, head, chunk, keys, dnorm, dS_tiles)
            for queries in strips:
                _query_grads(options, heads, x, head, index, chunk, queries, dnorm, dS_tiles)
            dnorms.append([lanes for _, lanes in dnorm.values()])
        _update(options, heads, x, index, chunk, dnorms)


def _normalizer_cotangent(
    options: Options, heads: Heads, x: _Refs, head: int, strip: slice
) -> tuple[jax.Array, jax.Array]:
    """Cotangent of each query's normalizer, times the normalizer: as `L 1` and as `1 L`."""
    assert x.h is not None
    dh, h = (ref[0, strip, heads.v_lanes(head)].astype(jnp.float32) for ref in (x.dh, x.h))
    sign = x.sublane_gates(head, strip)[:, packing.NORMALIZER : packing.NORMALIZER + 1]
    dnorm = sign * jnp.sum(options.fold_lanes(dh * h), axis=1, keepdims=True)
    return dnorm, to_lanes(dnorm)


def _key_grads(
    options: Options,
    heads: Heads,
    x: _Refs,
    head: int,
    chunk: slice,
    keys: slice,
    dnorm: dict,
    dS_tiles: dict,
):
    """dk and dv of one strip of keys; stores the tiles of dS in `dS_tiles`."""
    columns = heads.v_lanes(head)
    k, v = heads.only(x.k[0, keys], head), x.v[0, keys, columns]
    key_gates = x.sublane_gates(head, keys)
    P, dS = [], []
    for queries in options.strips(chunk):
        if queries.start < keys.start:
            continue
        query_gates, on_diagonal = x.packed[0, head, :, queries], queries == keys
        log_D = log_weights(options, key_gates, query_gates, on_diagonal=on_diagonal, upper=True)
        D = jnp.exp(log_D)
        P.append((product(k, x.q[0, queries], (1, 1)) * D).astype(v.dtype))
        dP = product(v, x.dh[0, queries, columns], (1, 1))
        dP = dP + dnorm[queries.start][1] if dnorm else dP
        dS.append((dP * D).astype(v.dtype))
        dS_tiles[queries.start, keys.start] = dS[-1]
    write = key_gates[:, packing.WRITE : packing.WRITE + 1]
    later = slice(keys.start, chunk.stop)
    dC = x.dC[0, 0].astype(v.dtype)
    dv = write * product(k, dC) + product(concatenate(P, 1), x.dh[0, later, columns])
    x.dv[0, keys, columns] = dv.astype(v.dtype)
    through_state = product(v, dC, (1, 1)) + x.dn[0, 0]
    dk = write * through_state + product(concatenate(dS, 1), x.q[0, later])
    heads.store(x.dk, keys, dk, head)
    x.sums[0, head, K_DK : K_DK + 1, keys] = _inner_products(options, k, dk)


def _query_grads(
    options: Options,
    heads: Heads,
    x: _Refs,
    head: int,
    index: int,
    chunk: slice,
    queries: slice,
    dnorm: dict,
    dS_tiles: dict,
):
    """dq of one strip of queries."""
    q, dh = heads.only(x.q[0, queries], head), x.dh[0, queries, heads.v_lanes(head)]
    read = x.sublane_gates(head, queries)[:, packing.READ : packing.READ + 1]
    dS = [tile for (start, _), tile in dS_tiles.items() if start == queries.start]
    through_state = product(dh, x.C_starts[0, 0, index].astype(dh.dtype), (1, 1))
    if dnorm:
        through_state = through_state + dnorm[queries.start][0] * x.n_starts[0, 0, index]
    causal = slice(chunk.start, queries.stop)
    dq = read * through_state + product(concatenate(dS, 0), x.k[0, causal], (0, 0))
    heads.store(x.dq, queries, dq, head)
    x.sums[0, head, Q_DQ : Q_DQ + 1, queries] = _inner_products(options, q, dq)


def _update(options: Options, heads: Heads, x: _Refs, index: int, chunk: slice, dnorms: list[list]):
    """Cotangents of the states before the chunk, and of their log scale."""
    q, first = x.q[0, chunk], slice(chunk.start, chunk.start + 1)
    reads = [x.gate(head, packing.READ, chunk) for head in heads.indices]
    decays = [x.gate(head, packing.DECAY, first) for head in heads.indices]
    # dn before dC: 13 % fewer bundles on a v6e than in the other order.
    dn = heads.join([decay * x.dn[0, 0] for decay in decays])
    if options.normalize:
        weights = [read * concatenate(w, 1) for read, w in zip(reads, dnorms, strict=True)]
        added = weighted_sum(concatenate(weights, 0), q)
        dn = dn + heads.join([added[head : head + 1] for head in heads.indices])
    x.dn[0, 0] = dn
    q_transposed = q.T.astype(jnp.float32)
    for head in heads.indices:
        own = heads.qk_lanes(head)
        weighted = (q_transposed[own] * reads[head]).astype(q.dtype)
        added = product(weighted, x.dh[0, chunk, heads.v_lanes(head)])
        dC = decays[head] * x.dC[0, 0, own] + added
        x.dC[0, 0, own] = dC
        scaling = dC * x.C_starts[0, 0, index, own].astype(jnp.float32)
        scaling = jnp.sum(options.fold_lanes(scaling), axis=0, keepdims=True)
        in_lanes = heads.only(dn * x.n_starts[0, 0, index], head)
        scaling = scaling + options.fold_lanes(in_lanes)
        lanes = slice(chunk.start, chunk.start + scaling.shape[1])
        x.sums[0, head, SCALING : SCALING + 1, lanes] = scaling


def _inner_products(options: Options, x: jax.Array, dx: jax.Array) -> jax.Array:
    """Sums of x * dx over the last axis, `1 L`."""
    return to_lanes(jnp.sum(options.fold_lanes(x.astype(jnp.float32) * dx), axis=1, keepdims=True))
