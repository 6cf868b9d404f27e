"""mLSTM forward and backward passes in Triton: launches of `triton_kernels` and `triton_gates`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu
from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm import gpu_passes, triton_gates, triton_kernels
from pallas_kernels.mlstm.gates import LogGates
from pallas_kernels.mlstm.options import Backward, Options, Packed
from pallas_kernels.mlstm.triton_tiles import Outputs, States

MAPS, MAPS_INTERPRETED = 128, 4
"""Chunks per step of the loop over earlier chunks; few when interpreted, for several steps."""

COLUMN_BYTES = 64
"""Size of the part of each position's h and dh that is loaded at a time."""


def _states(
    options: Options, packed, lhs, rhs, C, n, starts=None, *, dnorm: bool = False
) -> tuple[jax.Array, ...]:
    """Launches `triton_kernels.states`; see `gpu_passes.Launches`."""
    block: States = options.tile.states
    B, H, _, T = packed.shape
    K, V = (x.shape[2] // H for x in (lhs, rhs))
    blocks = (K // block.k) * (V // block.v)
    N = T // options.chunk
    shape = jax.ShapeDtypeStruct
    unused = packed, packed
    first = unused if C is None else (C, n)
    return _call(
        options,
        block,
        triton_kernels.states,
        (packed, lhs, rhs, *first, *(starts or unused)),
        (N,),
        (
            shape((B, H, N, K, V), lhs.dtype),
            shape((B, H, N, 1, K), jnp.float32),
            shape((B, H, K, V), jnp.float32),
            shape((B, H, 1, K), jnp.float32),
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
        FROM_ZEROS=C is None,
        REVERSED=starts is not None,
        WITH_DNORM=dnorm,
    )


def _outputs(
    options: Options, name: str, *arrays, normalize: bool = False, dnorm: bool = False
) -> tuple[jax.Array, ...]:
    """Launches `triton_kernels.outputs` on `arrays`, its first parameters."""
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


LAUNCHES = gpu_passes.Launches(_states, _outputs)
forward = functools.partial(gpu_passes.forward, LAUNCHES)
backward = functools.partial(gpu_passes.backward, LAUNCHES)


def pack_forward(options: Options, K: int, gates: LogGates, m_first: jax.Array) -> Packed:
    """The gates of the forward pass; see `options.Kernels`."""
    B, T, H = gates.log_i.shape
    N = T // options.chunk
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    maps = (m_first, m_first)  # not read
    if options.max_state:
        shapes = (f32((B, H, N)), f32((B, H, N)))
        maps = _call_gates(options, triton_gates.chunk_maps, gates, (), shapes, "mlstm_chunk_maps")
    shapes = (f32((B, H, 8, T)), f32((B, H, N)), f32((B, H)))
    unused = [m_first] * 4
    return Packed(*_pack(options, K, gates, (m_first, *maps, *unused), shapes, backward=False))


def pack_backward(options: Options, K: int, gates: LogGates, m_starts, d, h, dh) -> jax.Array:
    """The gates of the backward pass; see `options.Kernels`."""
    B, T, H = gates.log_i.shape
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = (f32((B, H, 8, T)), f32((1,)), f32((1,)))
    if h is None:
        d = h = dh = m_starts  # not read
    arrays = (*[m_starts] * 4, d, h, dh)
    return _pack(options, K, gates, arrays, shapes, backward=True)[0]


def _pack(options: Options, K: int, gates: LogGates, arrays, out_shape, *, backward: bool):
    """Launches `triton_gates.pack`."""
    V = arrays[-1].shape[-1] // gates.log_i.shape[2] if options.normalize and backward else 1
    return _call_gates(
        options,
        triton_gates.pack,
        gates,
        arrays,
        out_shape,
        "mlstm_gates_backward" if backward else "mlstm_gates",
        V=V,
        BV=gpu.divisor(V, COLUMN_BYTES // arrays[-1].dtype.itemsize),
        BLOCK=MAPS_INTERPRETED if options.interpret else MAPS,
        GRID=pre.grid(options.chunk),
        LOG_SCALE=-0.5 * math.log(K),
        EPS=options.eps,
        BACKWARD=backward,
        MAX_STATE=options.max_state,
        NORMALIZE=options.normalize,
        SIGMOID=options.forget_gate == "sigmoid",
    )


def gate_grads(options: Options, gates: LogGates, grads: Backward, end: jax.Array):
    """Launches `triton_gates.gate_grads`; see `options.Kernels`."""
    shape = jax.ShapeDtypeStruct(gates.log_i.shape, jnp.float32)
    return _call_chunks(
        options,
        triton_gates.gate_grads,
        gates,
        (grads.k_dk, grads.q_dq, grads.scaling, end, _resets(gates)),
        (shape, shape),
        "mlstm_gate_grads",
        PARTS=grads.k_dk.shape[2],
        SCALING_PARTS=grads.scaling.shape[3],
    )


def _resets(gates: LogGates) -> jax.Array:
    return gates.log_i if gates.reset is None else gates.reset.astype(jnp.int32)


def _call_gates(
    options: Options, kernel, gates: LogGates, arrays, out_shape, name: str, **settings
):
    arrays = (gates.log_i, gates.log_f, _resets(gates), *arrays)
    return _call_chunks(options, kernel, gates, arrays, out_shape, name, **settings)


def _call_chunks(
    options: Options, kernel, gates: LogGates, arrays, out_shape, name: str, **settings
):
    """Launches a kernel of `triton_gates`, with one program for each chunk of each head."""
    B, T, H = gates.log_i.shape
    N = T // options.chunk
    return gpu.call(
        kernel,
        arrays,
        out_shape,
        name=name,
        grid=(B * N, H),
        sizes=(N,),
        num_warps=4,
        num_stages=3,
        target=options.target,
        interpret=bool(options.interpret),
        H=H,
        L=options.chunk,
        BL=1 << (options.chunk - 1).bit_length(),
        RESETS=options.resets,
        **settings,
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
