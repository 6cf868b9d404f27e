"""One step of the mLSTM on a TPU: reads the state once and overwrites it.

The step is bound by the HBM traffic of the matrix memory, 8 K V bytes per head. Widths are not
padded, so the state is not copied.

Source: arXiv:2405.04517, section 2.3.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import common, tpu
from pallas_kernels.hardware import TPUS
from pallas_kernels.mlstm import cost
from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm.options import Options, State
from pallas_kernels.tpu import to_sublanes

DECAY, WRITE, BOUND, READ = range(len(pre.StepFactors._fields))

BLOCK_BYTES = 2 << 20
"""Largest block of columns of one head's C in VMEM, if its columns divide into tiles."""


def step(options: Options, q, k, v, gates: pre.LogGates, state: State) -> tuple[jax.Array, State]:
    """The step kernel; see `options.Kernels`."""
    C, n, m = state
    B, H, K, V = C.shape
    factors, m = pre.step_factors(gates, m, max_state=options.max_state)
    # Each factor fills one sublane of a tile `B H 8 128`.
    tile = common.pad(jnp.stack(factors, axis=-1), 2, 8)
    tile = jnp.broadcast_to(tile[..., None], (*tile.shape, common.LANES))
    width = _width(K, V)
    per_head = lambda *shape: pl.BlockSpec((1, 1, *shape), lambda b, h, c: (b, h, 0, 0))  # noqa: E731
    vector = per_head(1, K)
    memory = pl.BlockSpec((1, 1, K, width), lambda b, h, c: (b, h, 0, c))
    values = pl.BlockSpec((1, 1, 1, width), lambda b, h, c: (b, h, 0, c))
    h, C, n = pl.pallas_call(
        functools.partial(_kernel, options),
        grid=(B, H, V // width),
        in_specs=[per_head(8, common.LANES), vector, vector, values, memory, vector],
        out_specs=[values, memory, vector],
        out_shape=[
            jax.ShapeDtypeStruct((B, H, 1, V), v.dtype),
            jax.ShapeDtypeStruct(C.shape, jnp.float32),
            jax.ShapeDtypeStruct((B, H, 1, K), jnp.float32),
        ],
        input_output_aliases={4: 1, 5: 2},
        compiler_params=tpu.compiler_params(
            tpu.DIMENSION_SEMANTICS, max(tpu.SCOPED_BYTES, vmem_bytes(K, V))
        ),
        cost_estimate=cost.step(B, H, K, V, v.dtype),
        interpret=options.interpret,
        name="mlstm_decode",
    )(tile, *(_head_first(x) for x in (q, k, v)), C, n[:, :, None])
    return _head_first(h), (C, n[:, :, 0], m)


def vmem_bytes(K: int, V: int) -> int:
    """VMEM of one grid step: old and new C, double-buffered, and the transposes of q and k."""
    return 4 * 4 * K * _width(K, V) + 3 * 4 * K * K + (1 << 20)


def fits_vmem(K: int, V: int) -> bool:
    """Whether the step kernel supports heads of these widths on the current chip."""
    chip = tpu.current_chip()
    return chip is None or vmem_bytes(K, V) <= TPUS[chip].vmem_bytes


def _width(K: int, V: int) -> int:
    """Columns of C in one block: all of them, or a multiple of 128 that divides V."""
    if 4 * K * V <= BLOCK_BYTES or V % common.LANES:
        return V
    tiles = V // common.LANES
    divisors = [n for n in range(1, tiles + 1) if tiles % n == 0]
    fitting = [n for n in divisors if 4 * K * n * common.LANES <= BLOCK_BYTES]
    return common.LANES * max(fitting, default=1)


def _head_first(x: jax.Array) -> jax.Array:
    """`B 1 H K` to `B H 1 K`, and back."""
    return jnp.swapaxes(x, 1, 2)


def _kernel(options: Options, factors, q, k, v, C_old, n_old, h, C, n):
    factor = lambda index: factors[0, 0, index : index + 1, :1]  # noqa: E731
    scale = q.shape[-1] ** -0.5 * factor(READ)
    query = q[0, 0].astype(jnp.float32) * scale
    key = k[0, 0].astype(jnp.float32) * factor(WRITE)
    memory = factor(DECAY) * C_old[0, 0] + to_sublanes(key) * v[0, 0].astype(jnp.float32)
    C[0, 0] = memory

    # n and n_old are one buffer, so only the first block of columns may update it.
    @pl.when(pl.program_id(2) == 0)
    def _():
        n[0, 0] = factor(DECAY) * n_old[0, 0] + key

    u = jnp.sum(to_sublanes(query) * memory, axis=0, keepdims=True)
    if options.normalize:
        d = jnp.sum(query * n[0, 0], axis=1, keepdims=True)
        u = u / (jnp.maximum(jnp.abs(d), factor(BOUND)) + options.eps)
    h[0, 0] = u.astype(h.dtype)
