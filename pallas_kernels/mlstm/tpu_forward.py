"""mLSTM forward on a TPU: one pass over the chunks of a sequence, with the state in VMEM.

The grid is (batch, blocks of heads, blocks of chunks), with the last axis in order. A chunk is
computed in strips of queries; tiles above the diagonal are skipped. The output block of the final
state is the carry: its index does not depend on the block of chunks, so it stays in VMEM until the
heads are done.

Source of the formulas: arXiv:2405.04517 and arXiv:2503.14376; the schedule is ours.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.mlstm import cost, gates, packing
from pallas_kernels.mlstm.options import Forward, Options
from pallas_kernels.mlstm.tpu_layout import Heads
from pallas_kernels.tpu import product, to_lanes


def mlstm_forward(
    options: Options, packed, q, k, v, C: jax.Array | None, n: jax.Array | None, *, save: bool
) -> Forward:
    """The forward kernel; see `options.Kernels`."""
    B, H, _, T = packed.shape
    heads = Heads.of(options.lanes, H, q, v)
    K, groups = heads.qk_width, H // heads.num
    N, block = T // options.chunk, options.chunk * options.tile.chunks_per_block
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = (B, groups, K, heads.V), (B, groups, 1, K)

    tokens, fixed, starts, by_time = block_specs(options, heads, lambda c: c)
    first, first_specs = first_state(C, n, shapes)
    outputs = [
        (tokens(heads.v_width), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (fixed(K, heads.V), float32(shapes[0])),
        (fixed(1, K), float32(shapes[1])),
    ]
    if save:
        outputs += [
            (by_time(1), float32((B, H, 1, T))),
            (starts(K, heads.V), jax.ShapeDtypeStruct((B, groups, N, K, heads.V), q.dtype)),
            (starts(1, K), float32((B, groups, N, 1, K))),
        ]
    specs, out_shape = zip(*outputs, strict=True)
    h, C_last, n_last, *saved = pl.pallas_call(
        functools.partial(_kernel, options, heads),
        grid=(B, groups, T // block),
        in_specs=[by_time(8), tokens(K), tokens(K), tokens(heads.v_width), *first_specs],
        out_specs=list(specs),
        out_shape=list(out_shape),
        compiler_params=compiler_params(options, heads, v.dtype),
        cost_estimate=cost.forward(options, heads, B, T, H, q.dtype, save=save),
        interpret=options.interpret,
        metadata=options.metadata(),
        name="mlstm_forward",
    )(packed, q, k, v, *first)
    C_last = C_last.reshape(B, H, heads.K, heads.V)
    n_last = n_last.reshape(B, H, 1, heads.K)
    return Forward(h, C_last, n_last, *(saved if save else [None] * 3))


def compiler_params(options: Options, heads: Heads, dtype: jnp.dtype) -> Any:
    """Compiler parameters of both kernels."""
    limit = options.tile.vmem_limit(heads.K, heads.V, dtype)
    return tpu.compiler_params(tpu.DIMENSION_SEMANTICS, limit)


def first_state(
    C: jax.Array | None, n: jax.Array | None, shapes: tuple[tuple[int, ...], ...]
) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """The operands that `start_carry` reads, and their specs; none if the state is zeros."""
    if C is None or n is None:
        return [], []
    vector = pl.BlockSpec((1, 1, *shapes[1][2:]), lambda b, h, c: (b, h, 0, 0))
    return [C.reshape(shapes[0]), n.reshape(shapes[1])], [pl.BlockSpec(memory_space=pl.ANY), vector]


def block_specs(
    options: Options, heads: Heads, order: Callable[[Any], Any]
) -> tuple[Callable[..., pl.BlockSpec], ...]:
    """Makers of block specs for `B T HW`, `B H ...`, `B H N ...` and `B H count T`.

    H counts blocks of heads, except in `B H count T`. `order` maps the last grid index to a block
    of time; the backward pass reverses it.
    """
    block = options.chunk * options.tile.chunks_per_block

    def tokens(width):
        return pl.BlockSpec((1, block, width), lambda b, h, c: (b, order(c), h))

    def fixed(*shape):
        return pl.BlockSpec((1, 1, *shape), lambda b, h, c: (b, h, 0, 0))

    def starts(*shape):
        sizes = (1, 1, options.tile.chunks_per_block, *shape)
        return pl.BlockSpec(sizes, lambda b, h, c: (b, h, order(c), 0, 0))

    def by_time(count):
        sizes = (1, heads.num, count, block)
        return pl.BlockSpec(sizes, lambda b, h, c: (b, h, 0, order(c)))

    return tokens, fixed, starts, by_time


class _Refs(NamedTuple):
    """Refs of the blocks that the kernel reads and writes; the last three are None without `save`.

    C and n are the carry.
    """

    packed: jax.Ref
    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    h: jax.Ref
    C: jax.Ref
    n: jax.Ref
    d: jax.Ref | None = None
    C_starts: jax.Ref | None = None
    n_starts: jax.Ref | None = None


def _kernel(options: Options, heads: Heads, *refs):
    first = () if options.zero_state else refs[4:6]
    x = _Refs(*refs[:4], *refs[4 + len(first) :])
    start_carry(x.C, x.n, first)
    for index in range(options.tile.chunks_per_block):
        chunk = slice(index * options.chunk, (index + 1) * options.chunk)
        if x.C_starts is not None and x.n_starts is not None:
            x.C_starts[0, 0, index] = x.C[0, 0].astype(x.C_starts.dtype)
            x.n_starts[0, 0, index] = x.n[0, 0]
        for head in heads.indices:
            _outputs(options, heads, x, head, chunk)
        _update(heads, x, chunk)


def start_carry(C: jax.Ref, n: jax.Ref, first: Sequence[jax.Ref]) -> None:
    """Sets the carry of a block of heads before its first chunk: to `first`, or to zeros.

    Nothing overlaps the copy of a given C, which is as large as the chunks of a block together.
    """
    b, head, block = (pl.program_id(axis) for axis in range(3))

    @pl.when(block == 0)
    def _():
        if first:
            C_first, n_first = first
            pltpu.sync_copy(C_first.at[b, head], C.at[0, 0])
            n[...] = n_first[...]
        else:
            _fill_with_zeros(C)
            n[...] = jnp.zeros(n.shape, jnp.float32)


def _fill_with_zeros(C: jax.Ref) -> None:
    """In a loop: unrolled, the stores of a 256 x 512 state are 128 bundles of code."""
    _, _, K, V = C.shape
    size = math.gcd(K, 32)

    @pl.loop(0, K // size)
    def _(index):
        block = pl.ds(pl.multiple_of(index * size, size), size)
        C[0, 0, block] = jnp.zeros((size, V), jnp.float32)


def _outputs(options: Options, heads: Heads, x: _Refs, head: int, chunk: slice):
    """h of one head and chunk, from its keys and values and the state at its start."""
    columns, C, n = heads.v_lanes(head), x.C[0, 0].astype(x.v.dtype), x.n[0, 0]
    strips = options.strips(chunk)
    for strip in strips:
        query_gates = x.packed[0, head, :, strip].T
        read = query_gates[:, packing.READ : packing.READ + 1]
        q = heads.only(x.q[0, strip], head)
        weights = []
        for keys in strips:
            if keys.start > strip.start:
                break
            key_gates = x.packed[0, head, :, keys]
            on_diagonal = keys == strip
            log_D = log_weights(
                options, query_gates, key_gates, on_diagonal=on_diagonal, upper=False
            )
            weights.append(product(q, x.k[0, keys], (1, 1)) * jnp.exp(log_D))
        causal = slice(chunk.start, strip.stop)
        P = concatenate([weight.astype(x.v.dtype) for weight in weights], 1)
        u = read * product(q, C) + product(P, x.v[0, causal, columns])
        if options.normalize:
            from_state = read * options.fold_lanes(q.astype(jnp.float32) * n)
            total = functools.reduce(jnp.add, weights)  # not yet rounded to the dtype of v
            d = jnp.sum(options.fold_lanes(total) + from_state, axis=1, keepdims=True)
            bound = query_gates[:, packing.NORMALIZER : packing.NORMALIZER + 1]
            u = u * (1.0 / (jnp.maximum(jnp.abs(d), bound) + options.eps))
            if x.d is not None:
                x.d[0, head, :, strip] = to_lanes(d)
        x.h[0, strip, columns] = u.astype(x.h.dtype)


def _update(heads: Heads, x: _Refs, chunk: slice):
    """Advances the states of all heads to the end of one chunk."""
    k, first = x.k[0, chunk], slice(chunk.start, chunk.start + 1)
    writes = [x.packed[0, head, packing.WRITE : packing.WRITE + 1, chunk] for head in heads.indices]
    decays = [x.packed[0, head, packing.DECAY : packing.DECAY + 1, first] for head in heads.indices]
    added = weighted_sum(concatenate(writes, 0), k)
    n = [decay * x.n[0, 0] + added[head : head + 1] for head, decay in enumerate(decays)]
    x.n[0, 0] = heads.join(n)
    k_transposed = k.T.astype(jnp.float32)
    for head in heads.indices:
        own = heads.qk_lanes(head)
        weighted = (k_transposed[own] * writes[head]).astype(x.v.dtype)
        added = product(weighted, x.v[0, chunk, heads.v_lanes(head)])
        x.C[0, 0, own] = decays[head] * x.C[0, 0, own] + added


def log_weights(options: Options, sublane_gates, lane_gates, *, on_diagonal: bool, upper: bool):
    """Log weights of one tile of queries and keys; NEG for later keys and across resets.

    The packed gates are `R 8` along the tile's first axis and `8 R` along its second. The first
    axis is queries; with `upper` it is keys, and the upper triangle is causal.
    """
    first, second = (packing.KEY, packing.QUERY) if upper else (packing.QUERY, packing.KEY)
    fine = sublane_gates[:, first : first + 1] + lane_gates[second : second + 1]
    index = slice(packing.COARSE, packing.COARSE + 1)
    coarse = sublane_gates[:, index] - lane_gates[index]
    x = fine - coarse if upper else fine + coarse
    visible = None
    if on_diagonal:
        i, j = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
        visible = i <= j if upper else i >= j
    if options.resets:
        index = slice(packing.SEGMENT, packing.SEGMENT + 1)
        same = sublane_gates[:, index] == lane_gates[index]
        visible = same if visible is None else visible & same
    return x if visible is None else jnp.where(visible, x, gates.NEG)


def weighted_sum(weights: jax.Array, x: jax.Array) -> jax.Array:
    """`G L` in float32 times `L K`, without rounding the weights even if x is bfloat16.

    The weights are split into three bfloat16 vectors, stacked along the sublanes; the MXU takes no
    longer for eight sublanes than for one.
    """
    if x.dtype == jnp.float32:
        return product(weights, x)
    high = weights.astype(x.dtype).astype(jnp.float32)
    middle = (weights - high).astype(x.dtype).astype(jnp.float32)
    low = weights - high - middle
    parts = jnp.concatenate([high, middle, low], axis=0).astype(x.dtype)
    return jnp.sum(product(parts, x).reshape(3, weights.shape[0], -1), axis=0)


def concatenate(strips: list[jax.Array], axis: int) -> jax.Array:
    """`jnp.concatenate`, but a single strip is returned as it is."""
    return strips[0] if len(strips) == 1 else jnp.concatenate(strips, axis=axis)
