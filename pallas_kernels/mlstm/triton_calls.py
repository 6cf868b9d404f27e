"""mLSTM forward and backward passes on a GPU, as launches of the kernels in `triton_kernels`.

Each pass first computes the states at chunk boundaries, then all positions in parallel.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu
from pallas_kernels.mlstm import gates, triton_kernels
from pallas_kernels.mlstm.options import Backward, Forward, Options
from pallas_kernels.mlstm.triton_tiles import Outputs, States


def forward(options: Options, packed, q, k, v, C, n, *, save: bool) -> Forward:
    """The forward pass; see `options.Kernels`."""
    C_starts, n_starts, C, n, _ = _states(options, packed, k, v, C, n)
    normalize = options.normalize
    h, d = _outputs(options, "h", packed, q, k, v, C_starts, n_starts, v, normalize=normalize)
    d = d[:, :, :1] if normalize else None
    return Forward(h, C, n, *((d, C_starts, n_starts) if save else [None] * 3))


def backward(options: Options, packed, q, k, v, h, dh, C_starts, n_starts, dC, dn) -> Backward:
    """The backward pass; see `options.Kernels`."""
    dnorm = h is not None
    if dnorm:
        packed = gates.scale_normalizer(packed, h, dh)
    saved = (C_starts, n_starts)
    *ends, dC, dn, scaling = _states(options, packed, q, dh, dC, dn, saved, dnorm=dnorm)
    dq, q_dq = _outputs(options, "dq", packed, dh, v, k, *saved, q, dnorm=dnorm)
    dk, k_dk = _outputs(options, "dk", packed, v, dh, q, *ends, k, dnorm=dnorm)
    dv, _ = _outputs(options, "dv", packed, k, q, dh, *ends, v)
    return Backward(dq, dk, dv, k_dk.sum(2), q_dq.sum(2), scaling.sum(-1), dC, dn)


def _states(
    options: Options, packed, lhs, rhs, C, n, starts=None, *, dnorm: bool = False
) -> tuple[jax.Array, ...]:
    """Launches `triton_kernels.states`; with `starts`, the states of the forward pass, in reverse.

    Returns:
        C `B H N K V` and n `B H N 1 K` at chunk boundaries, the last C `B H K V` and n `B H 1 K`,
        and with `starts` the sums `B H N blocks` of the gradient of the log scale.
    """
    block: States = options.tile.states
    B, H, _, T = packed.shape
    K, V = C.shape[2:]
    blocks = (K // block.k) * (V // block.v)
    N = T // options.chunk
    shape = jax.ShapeDtypeStruct
    return _call(
        options,
        block,
        triton_kernels.states,
        (packed, lhs, rhs, C, n, *(starts or (C, n))),
        (N,),
        (
            shape((B, H, N, K, V), lhs.dtype),
            shape((B, H, N, 1, K), jnp.float32),
            shape(C.shape, jnp.float32),
            shape(n.shape, jnp.float32),
            shape((B, H, N, blocks) if starts else (1,), jnp.float32),
        ),
        name="mlstm_states" if starts is None else "mlstm_dstates",
        grid=(B * H * blocks,),
        H=H,
        K=K,
        V=V,
        L=options.chunk,
        BK=block.k,
        BV=block.v,
        BT=block.positions,
        REVERSED=starts is not None,
        WITH_DNORM=dnorm,
    )


def _outputs(
    options: Options, name: str, *arrays, normalize: bool = False, dnorm: bool = False
) -> tuple[jax.Array, ...]:
    """Launches `triton_kernels.outputs` on `arrays`, its first parameters.

    Returns:
        h, dq, dk or dv, `B T HW`, and its sums `B H blocks T`.
    """
    packed, lhs, _, values, *_ = arrays
    block: Outputs = getattr(options.tile, name)
    B, H, _, T = packed.shape
    A, W = lhs.shape[2] // H, values.shape[2] // H
    blocks = W // block.width
    sums = name in ("dq", "dk") or normalize
    return _call(
        options,
        block,
        triton_kernels.outputs,
        arrays,
        (T // options.chunk,),
        (
            jax.ShapeDtypeStruct(values.shape, values.dtype),
            jax.ShapeDtypeStruct((B, H, blocks, T) if sums else (1,), jnp.float32),
        ),
        name=f"mlstm_{name}",
        grid=(B * (T // block.positions), H * blocks),
        H=H,
        A=A,
        W=W,
        L=options.chunk,
        BT=block.positions,
        BS=block.other_positions,
        BA=block.inner,
        BC=block.state_inner,
        BW=block.width,
        LATER=name in ("dk", "dv"),
        TRANSPOSED=name in ("dq", "dk"),
        NORMALIZE=normalize,
        WITH_SUMS=sums,
        WITH_DNORM=dnorm,
        RESETS=options.resets,
        EPS=options.eps,
    )


def _call(options: Options, block: Any, kernel, arrays, sizes, out_shape, **settings):
    return gpu.call(
        kernel,
        arrays,
        out_shape,
        sizes=sizes,
        num_warps=block.warps,
        num_stages=block.stages,
        target=options.target,
        interpret=bool(options.interpret),
        UPCAST=bool(options.interpret),
        **settings,
    )
