"""mLSTM forward on a TPU: one pass over the chunks of a sequence, with the state in VMEM.

The grid is (batch, heads, blocks of chunks), with blocks in order. A chunk is computed in strips of
queries; tiles above the diagonal are skipped. The output block of the final state is the carry: its
index does not depend on the block of chunks, so it stays in VMEM until the head is done.

Source of the formulas: arXiv:2405.04517 and arXiv:2503.14376; the schedule is ours.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.mlstm import cost, gates, packing
from pallas_kernels.mlstm.options import Forward, Options
from pallas_kernels.tpu import product, to_lanes

IN_HBM = pl.BlockSpec(memory_space=pl.ANY)


def mlstm_forward(options: Options, packed, q, k, v, C, n, *, save: bool) -> Forward:
    """The forward kernel; see `options.Kernels`."""
    B, H, _, T = packed.shape
    K, V = C.shape[2:]
    N, block = T // options.chunk, options.chunk * options.tile.chunks_per_block
    limit = options.tile.vmem_limit(K, V, v.dtype)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

    tokens, fixed, starts, by_time = block_specs(options, lambda c: c)
    outputs = [
        (tokens(V), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        (fixed(K, V), float32(C.shape)),
        (fixed(1, K), float32(n.shape)),
    ]
    if save:
        outputs += [
            (by_time(1), float32((B, H, 1, T))),
            (starts(K, V), jax.ShapeDtypeStruct((B, H, N, K, V), q.dtype)),
            (starts(1, K), float32((B, H, N, 1, K))),
        ]
    specs, shapes = zip(*outputs, strict=True)
    results = pl.pallas_call(
        functools.partial(_kernel, options),
        grid=(B, H, T // block),
        in_specs=[by_time(8), tokens(K), tokens(K), tokens(V), IN_HBM, fixed(1, K)],
        out_specs=list(specs),
        out_shape=list(shapes),
        compiler_params=tpu.compiler_params(tpu.DIMENSION_SEMANTICS, limit),
        cost_estimate=cost.forward(options, B, T, H, K, V, q.dtype, save=save),
        interpret=options.interpret,
        metadata=options.metadata(),
        name="mlstm_forward",
    )(packed, q, k, v, C, n)
    return Forward(*results, *([] if save else [None] * 3))


def block_specs(
    options: Options, order: Callable[[Any], Any]
) -> tuple[Callable[..., pl.BlockSpec], ...]:
    """Makers of block specs for `B T HW`, `B H ...`, `B H N ...` and `B H count T`.

    `order` maps the last grid index to a block of time; the backward pass reverses it.
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
        return pl.BlockSpec((1, 1, count, block), lambda b, h, c: (b, h, 0, order(c)))

    return tokens, fixed, starts, by_time


def _kernel(options: Options, packed, q, k, v, C_first, n_first, h, C, n, *saved):
    b, head, block = (pl.program_id(axis) for axis in range(3))

    @pl.when(block == 0)
    def _():
        pltpu.sync_copy(C_first.at[b, head], C.at[0, 0])
        n[...] = n_first[...]

    for index in range(options.tile.chunks_per_block):
        chunk = slice(index * options.chunk, (index + 1) * options.chunk)
        d_ref = None
        if saved:
            d_ref, C_starts, n_starts = saved
            C_starts[0, 0, index] = C[0, 0].astype(C_starts.dtype)
            n_starts[0, 0, index] = n[0, 0]
        _outputs(options, chunk, packed, q, k, v, h, C[0, 0], n[0, 0], d_ref)
        _update(options, chunk, packed, k, v, C, n)


def _outputs(options: Options, chunk, packed, q_ref, k_ref, v_ref, h_ref, C, n, d_ref):
    """h of one chunk, from its keys and values and the state at its start."""
    C = C.astype(v_ref.dtype)
    strips = options.strips(chunk)
    for strip in strips:
        query_gates = packed[0, 0, :, strip].T
        read = query_gates[:, packing.READ : packing.READ + 1]
        q = q_ref[0, strip]
        weights = []
        for keys in strips:
            if keys.start > strip.start:
                break
            x = log_weights(
                options, query_gates, packed[0, 0, :, keys], on_diagonal=keys == strip, upper=False
            )
            weights.append(product(q, k_ref[0, keys], (1, 1)) * jnp.exp(x))
        causal = slice(chunk.start, strip.stop)
        P = concatenate([weight.astype(v_ref.dtype) for weight in weights], 1)
        u = read * product(q, C) + product(P, v_ref[0, causal])
        if options.normalize:
            from_state = read * options.fold_lanes(q.astype(jnp.float32) * n)
            total = functools.reduce(jnp.add, weights)  # not yet rounded to the dtype of v
            d = jnp.sum(options.fold_lanes(total) + from_state, axis=1, keepdims=True)
            bound = query_gates[:, packing.NORMALIZER : packing.NORMALIZER + 1]
            u = u * (1.0 / (jnp.maximum(jnp.abs(d), bound) + options.eps))
            if d_ref is not None:
                d_ref[0, 0, :, strip] = to_lanes(d)
        h_ref[0, strip] = u.astype(h_ref.dtype)


def _update(options: Options, chunk, packed, k_ref, v_ref, C, n):
    """Advances the state to the end of one chunk."""
    write = packed[0, 0, packing.WRITE : packing.WRITE + 1, chunk]
    decay = packed[0, 0, packing.DECAY : packing.DECAY + 1, chunk.start : chunk.start + 1]
    k = k_ref[0, chunk]
    weighted = (k.T.astype(jnp.float32) * write).astype(v_ref.dtype)
    C[0, 0] = decay * C[0, 0] + product(weighted, v_ref[0, chunk])
    n[0, 0] = decay * n[0, 0] + weighted_sum(write, k)


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
    """`1 L` in float32 times `L K`, without rounding the weights even if x is bfloat16.

    The weights are split into three bfloat16 vectors, stacked along the sublanes; the MXU takes no
    longer for eight sublanes than for one.
    """
    if x.dtype == jnp.float32:
        return product(weights, x)
    high = weights.astype(x.dtype).astype(jnp.float32)
    middle = (weights - high).astype(x.dtype).astype(jnp.float32)
    low = weights - high - middle
    parts = jnp.concatenate([high, middle, low], axis=0).astype(x.dtype)
    return jnp.sum(product(parts, x), axis=0, keepdims=True)


def concatenate(strips: list[jax.Array], axis: int) -> jax.Array:
    """`jnp.concatenate`, but a single strip is returned as it is."""
    return strips[0] if len(strips) == 1 else jnp.concatenate(strips, axis=axis)
