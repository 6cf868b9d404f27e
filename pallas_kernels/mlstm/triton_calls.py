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


def forward(options: Options, rows, q, k, v, C, n, *, save: bool) -> Forward:
    """All chunks of all sequences; see `options.Kernels`."""
    C_starts, n_starts, C, n, _ = _states(options, rows, k, v, C, n)
    normalize = options.normalize
    h, d = _outputs(options, "h", rows, q, k, v, C_starts, n_starts, v, normalize=normalize)
    d = d[:, :, :1] if normalize else None
    return Forward(h, C, n, *((d, C_starts, n_starts) if save else [None] * 3))


def backward(options: Options, rows, q, k, v, h, dh, C_starts, n_starts, dC, dn) -> Backward:
    """Cotangents of one call; see `options.Kernels`."""
    extra = h is not None
    if extra:
        # The cotangent of each row's normalizer, times it, in place of its sign. It is summed where
        # the widths are the last axis; only the sums are transposed.
        B, H, _, T = rows.shape
        sums = (h.astype(jnp.float32) * dh.astype(jnp.float32)).reshape(B, T, H, -1).sum(-1)
        rows = rows.at[:, :, gates.EXTRA].multiply(jnp.swapaxes(sums, 1, 2))
    saved = (C_starts, n_starts)
    *ends, dC, dn, scaling = _states(options, rows, q, dh, dC, dn, saved, extra=extra)
    dq, q_dq = _outputs(options, "dq", rows, dh, v, k, *saved, q, extra=extra)
    dk, k_dk = _outputs(options, "dk", rows, v, dh, q, *ends, k, extra=extra)
    dv, _ = _outputs(options, "dv", rows, k, q, dh, *ends, v)
    return Backward(dq, dk, dv, k_dk.sum(2), q_dq.sum(2), scaling.sum(-1), dC, dn)


def _states(
    options: Options, rows, x, values, first, first_n, starts=None, *, extra: bool = False
) -> tuple[jax.Array, ...]:
    """States at borders and at the end, `B H N K V`, `B H N 1 K`, `B H K V`, `B H 1 K`, and sums.

    With `starts`, the states of the forward pass, the direction is backward.
    """
    block: States = options.tile.states
    B, H, _, T = rows.shape
    K, V = first.shape[2:]
    blocks = (K // block.k) * (V // block.v)
    N = T // options.chunk
    shape = jax.ShapeDtypeStruct
    return _call(
        options,
        block,
        triton_kernels.states,
        (rows, x, values, first, first_n, *(starts or (first, first_n))),
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
    options: Options, name: str, *arrays, normalize: bool = False, extra: bool = False
) -> tuple[jax.Array, ...]:
    """One of h, dq, dk and dv, `B T HW`, and the sums that come with it, `B H blocks T`.

    The arrays are the first parameters of `triton_kernels.outputs`.
    """
    rows, mine, _, values, *_ = arrays
    block: Outputs = getattr(options.tile, name)
    B, H, _, T = rows.shape
    A, W = mine.shape[2] // H, values.shape[2] // H
    blocks = W // block.width
    sums = name in ("dq", "dk") or normalize
    return _call(
        options,
        block,
        triton_kernels.outputs,
        arrays,
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
