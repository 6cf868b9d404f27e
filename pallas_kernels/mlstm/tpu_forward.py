"""mLSTM forward on a TPU: one pass over the chunks of a sequence, the state never leaves VMEM.

The grid is (batch, heads, blocks of chunks), blocks in order. A chunk is worked through in strips
of rows; what lies above the diagonal in whole tiles is left out. The output block of the final
state, which stays in place while blocks of one head follow each other, is the memory itself.

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
from pallas_kernels.mlstm import cost, gates
from pallas_kernels.mlstm.options import Forward, Options
from pallas_kernels.tpu import as_row, product

IN_HBM = pl.BlockSpec(memory_space=pl.ANY)


def mlstm_forward(options: Options, rows, q, k, v, C, n, *, save: bool) -> Forward:
    """All chunks of all sequences; see `options.Kernels`."""
    B, H, _, T = rows.shape
    K, V = C.shape[2:]
    N, span = T // options.chunk, options.chunk * options.tile.chunks_per_block
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
        functools.partial(_body, options),
        grid=(B, H, T // span),
        in_specs=[by_time(8), tokens(K), tokens(K), tokens(V), IN_HBM, fixed(1, K)],
        out_specs=list(specs),
        out_shape=list(shapes),
        compiler_params=tpu.compiler_params(tpu.IN_ORDER, limit),
        cost_estimate=cost.forward(options, B, T, H, K, V, q.dtype, save=save),
        interpret=options.interpret,
        metadata=options.metadata(),
        name="mlstm_forward",
    )(rows, q, k, v, C, n)
    return Forward(*results, *([] if save else [None] * 3))


def block_specs(
    options: Options, at: Callable[[Any], Any]
) -> tuple[Callable[..., pl.BlockSpec], ...]:
    """Blocks of `B T HW`, `B H ...`, `B H N ...` and `B H count T`; `at` orders blocks of time."""
    span = options.chunk * options.tile.chunks_per_block

    def tokens(width):
        return pl.BlockSpec((1, span, width), lambda b, h, c: (b, at(c), h))

    def fixed(*shape):
        return pl.BlockSpec((1, 1, *shape), lambda b, h, c: (b, h, 0, 0))

    def starts(*shape):
        block = (1, 1, options.tile.chunks_per_block, *shape)
        return pl.BlockSpec(block, lambda b, h, c: (b, h, at(c), 0, 0))

    def by_time(count):
        return pl.BlockSpec((1, 1, count, span), lambda b, h, c: (b, h, 0, at(c)))

    return tokens, fixed, starts, by_time


def _body(options: Options, rows, q, k, v, C_first, n_first, h, C, n, *saved):
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
        _outputs(options, chunk, rows, q, k, v, h, C[0, 0], n[0, 0], d_ref)
        _update(options, chunk, rows, k, v, C, n)


def _outputs(options: Options, chunk, rows, q_ref, k_ref, v_ref, h_ref, C, n, d_ref):
    """h of one chunk from the memory at its start."""
    C = C.astype(v_ref.dtype)
    strips = options.strips(chunk)
    for strip in strips:
        by_row = rows[0, 0, :, strip].T
        across = by_row[:, gates.ACROSS : gates.ACROSS + 1]
        q = q_ref[0, strip]
        weights = []
        for source in strips:
            if source.start > strip.start:
                break
            x = log_weights(
                options, by_row, rows[0, 0, :, source], on_diagonal=source == strip, upper=False
            )
            weights.append(product(q, k_ref[0, source], (1, 1)) * jnp.exp(x))
        seen = slice(chunk.start, strip.stop)
        P = joined([weight.astype(v_ref.dtype) for weight in weights], 1)
        u = across * product(q, C) + product(P, v_ref[0, seen])
        if options.normalize:
            read = across * options.folded(q.astype(jnp.float32) * n)
            total = functools.reduce(jnp.add, weights)  # before it is rounded
            d = jnp.sum(options.folded(total) + read, axis=1, keepdims=True)
            bound = by_row[:, gates.EXTRA : gates.EXTRA + 1]
            u = u * (1.0 / (jnp.maximum(jnp.abs(d), bound) + options.eps))
            if d_ref is not None:
                d_ref[0, 0, :, strip] = as_row(d)
        h_ref[0, strip] = u.astype(h_ref.dtype)


def _update(options: Options, chunk, rows, k_ref, v_ref, C, n):
    """The memory after one chunk."""
    written = rows[0, 0, gates.WRITTEN : gates.WRITTEN + 1, chunk]
    kept = rows[0, 0, gates.KEPT : gates.KEPT + 1, chunk.start : chunk.start + 1]
    keys = k_ref[0, chunk]
    weighted = (keys.T.astype(jnp.float32) * written).astype(v_ref.dtype)
    C[0, 0] = kept * C[0, 0] + product(weighted, v_ref[0, chunk])
    n[0, 0] = kept * n[0, 0] + row_product(written, keys)


def log_weights(options: Options, column, row, *, on_diagonal: bool, upper: bool):
    """log weight of sources in rows, one tile; NEG where a source comes later, or before a reset.

    `column` `R 8` and `row` `8 R` are the gates along the first and the second axis of the tile.
    With `upper`, sources are along the first, and the upper triangle counts.
    """
    mine, other = (gates.SOURCE, gates.ROW) if upper else (gates.ROW, gates.SOURCE)
    near = column[:, mine : mine + 1] + row[other : other + 1]
    far = column[:, gates.COARSE : gates.COARSE + 1] - row[gates.COARSE : gates.COARSE + 1]
    x = near - far if upper else near + far
    seen = None
    if on_diagonal:
        first = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        second = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        seen = first <= second if upper else first >= second
    if options.resets:
        at = slice(gates.SEGMENT, gates.SEGMENT + 1)
        same = column[:, at] == row[at]
        seen = same if seen is None else seen & same
    return x if seen is None else jnp.where(seen, x, gates.NEG)


def row_product(weights: jax.Array, x: jax.Array) -> jax.Array:
    """`1 L` in float32 times `L K`, with all digits of the weights for operands in bfloat16 too.

    Eight rows cost a matrix unit what one costs: three of them carry the weights' parts.
    """
    if x.dtype == jnp.float32:
        return product(weights, x)
    high = weights.astype(x.dtype).astype(jnp.float32)
    middle = (weights - high).astype(x.dtype).astype(jnp.float32)
    low = weights - high - middle
    parts = jnp.concatenate([high, middle, low], axis=0).astype(x.dtype)
    return jnp.sum(product(parts, x), axis=0, keepdims=True)


def joined(pieces: list[jax.Array], axis: int) -> jax.Array:
    """The pieces behind each other."""
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)
