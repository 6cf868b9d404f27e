"""The mLSTM's forward and backward pass on a GPU: each one run along the chunks, then all at once.

The kernels are in `triton_kernels`; here stands with what arrays they are called.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu
from pallas_kernels.mlstm import gates, triton_kernels
from pallas_kernels.mlstm.options import Backward, Forward, Options
from pallas_kernels.mlstm.triton_tiles import Outputs, States


def forward(
    options: Options,
    rows: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    C: jax.Array,
    n: jax.Array,
    *,
    save: bool,
) -> Forward:
    """All chunks of all sequences.

    Args:
        rows: `B H 8 T`, of `gates.forward_rows`.
        q, k, v: `B T HK`, `B T HK`, `B T HV`; heads side by side.
        C, n: `B H K V` and `B H 1 K`, float32: the memory before the first step.
        save: also return what the backward pass needs.
    """
    tile = options.tile
    C_starts, n_starts, C, n, _ = _states(options, tile.states, rows, k, v, C, n)
    h, d = _outputs(
        options, tile.h, "h", rows, q, k, v, C_starts, n_starts, v, normalize=options.normalize
    )
    d = d[:, :, :1] if options.normalize else None
    return Forward(h, C, n, *((d, C_starts, n_starts) if save else [None] * 3))


def backward(
    options: Options,
    rows: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    h: jax.Array | None,
    dh: jax.Array,
    C_starts: jax.Array,
    n_starts: jax.Array,
    dC: jax.Array,
    dn: jax.Array,
) -> Backward:
    """Cotangents of one call.

    Args:
        rows: `B H 8 T`, of `gates.backward_rows`.
        q, k, v, dh: `B T HK`, `B T HK`, `B T HV`, `B T HV`.
        h: `B T HV`, of the forward pass; None: the normaliser has no gradient.
        C_starts, n_starts: `B H N K V` and `B H N 1 K`, states at chunk starts.
        dC, dn: `B H K V` and `B H 1 K`, float32: cotangents of the memory after the last step.
    """
    tile = options.tile
    if h is not None:
        rows = _with_normaliser(rows, h, dh)
    extra = dict(extra=h is not None)
    saved = (C_starts, n_starts)
    dC_ends, dn_ends, dC, dn, scaling = _states(
        options, tile.states, rows, q, dh, dC, dn, saved, **extra
    )
    ends = (dC_ends, dn_ends)
    dq, q_dq = _outputs(options, tile.dq, "dq", rows, dh, v, k, *saved, q, **extra)
    dk, k_dk = _outputs(options, tile.dk, "dk", rows, v, dh, q, *ends, k, **extra)
    dv, _ = _outputs(options, tile.dv, "dv", rows, k, q, dh, *ends, v)
    return Backward(dq, dk, dv, k_dk.sum(2), q_dq.sum(2), scaling.sum(-1), dC, dn)


def _with_normaliser(rows: jax.Array, h: jax.Array, dh: jax.Array) -> jax.Array:
    """The gates with the cotangent of each row's normaliser, times it, in place of its sign."""
    B, H, _, T = rows.shape
    # Summed where the widths are the last axis; only the sums are transposed.
    found = (h.astype(jnp.float32) * dh.astype(jnp.float32)).reshape(B, T, H, -1).sum(-1)
    return rows.at[:, :, gates.EXTRA].multiply(jnp.swapaxes(found, 1, 2))


def _states(
    options: Options,
    block: States,
    rows: jax.Array,
    x: jax.Array,
    values: jax.Array,
    first: jax.Array,
    first_n: jax.Array,
    starts: tuple[jax.Array, jax.Array] | None = None,
    *,
    extra: bool = False,
) -> tuple[jax.Array, ...]:
    """Memories at borders and at the end, `B H N K V`, `B H N 1 K`, `B H K V`, `B H 1 K`, and sums.

    With `starts`, the states of the forward pass, the direction is backward.
    """
    B, H, _, T = rows.shape
    K, V = first.shape[2:]
    blocks = (K // block.k) * (V // block.v)
    N = T // options.chunk
    shape = jax.ShapeDtypeStruct
    kept, kept_n = starts or (first, first_n)
    return _call(
        options,
        block,
        triton_kernels.states,
        (rows, x, values, first, first_n, kept, kept_n),
        (
            shape((B, H, N, K, V), x.dtype),
            shape((B, H, N, 1, K), jnp.float32),
            shape(first.shape, jnp.float32),
            shape(first_n.shape, jnp.float32),
            shape((B, H, N, blocks) if starts else (1,), jnp.float32),
        ),
        name="mlstm_states" if starts is None else "mlstm_dstates",
        grid=(B * H * blocks,),
        T=T,
        H=H,
        K=K,
        V=V,
        L=options.chunk,
        BK=block.k,
        BV=block.v,
        BT=block.positions,
        REVERSED=starts is not None,
        WITH_EXTRA=extra,
    )


def _outputs(
    options: Options,
    block: Outputs,
    name: str,
    rows: jax.Array,
    mine: jax.Array,
    theirs: jax.Array,
    values: jax.Array,
    memory: jax.Array,
    vector: jax.Array,
    known: jax.Array,
    *,
    normalize: bool = False,
    extra: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One of h, dq, dk and dv, `B T HW`, and the sums that come with it, `B H blocks T`."""
    B, H, _, T = rows.shape
    A, W = mine.shape[2] // H, values.shape[2] // H
    blocks = W // block.width
    sums = name in ("dq", "dk") or normalize
    return _call(
        options,
        block,
        triton_kernels.outputs,
        (rows, mine, theirs, values, memory, vector, known),
        (
            jax.ShapeDtypeStruct(values.shape, values.dtype),
            jax.ShapeDtypeStruct((B, H, blocks, T) if sums else (1,), jnp.float32),
        ),
        name=f"mlstm_{name}",
        grid=(B * H * (T // block.rows), blocks),
        T=T,
        H=H,
        A=A,
        W=W,
        L=options.chunk,
        BR=block.rows,
        BC=block.others,
        BA=block.inner,
        BM=block.memory,
        BW=block.width,
        LATER=name in ("dk", "dv"),
        TRANSPOSED=name in ("dq", "dk"),
        NORMALIZE=normalize,
        WITH_SUMS=sums,
        WITH_EXTRA=extra,
        RESETS=options.resets,
        EPS=options.eps,
    )


def _call(options: Options, block: Any, kernel, arrays, out_shape, **settings):
    return gpu.call(
        kernel,
        arrays,
        out_shape,
        num_warps=block.warps,
        num_stages=block.stages,
        target=options.target,
        interpret=bool(options.interpret),
        UPCAST=bool(options.interpret),
        **settings,
    )
