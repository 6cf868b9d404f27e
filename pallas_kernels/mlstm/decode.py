"""One step of the mLSTM on a TPU: the memory is read once and written where it stood.

The step is bound by the traffic of the matrix memory, 8 K V bytes a head; everything else is small.
Widths are taken as they are: nothing is filled up, so nothing is copied.

Source: arXiv:2405.04517, section 2.3.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import common, tiles
from pallas_kernels.common import column
from pallas_kernels.mlstm import cost
from pallas_kernels.mlstm import gates as pre

KEPT, ADDED, BOUND, READ = range(4)

BLOCK_BYTES = 2 << 20
"""Most of one head's memory that is in VMEM at once, where its columns can be cut."""


def mlstm_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: pre.LogGates,
    state: tuple[jax.Array, jax.Array, jax.Array],
    *,
    max_state: bool,
    normalize: bool,
    eps: float,
    interpret: Any = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """h and the memory after one step; under `jit` with the state donated it is updated in place.

    Args:
        q, k, v: `B 1 H K`, `B 1 H K`, `B 1 H V`; zeros where masked.
        gates: `B 1 H`, and resets `B 1`.
        state: C `B H K V`, n `B H K`, m `B H`, float32.
        max_state: whether m follows the gates; else it is 0.
        normalize, eps: as in `vjp.mlstm`.
        interpret: of `pallas_call`.

    Returns h `B 1 H V` in the dtype of v, and C, n, m.
    """
    C, n, m = state
    B, H, K, V = C.shape
    factors, m = _factors(gates, m, max_state)
    width = _width(K, V)
    per_head = lambda *shape: pl.BlockSpec((1, 1, *shape), lambda b, h, c: (b, h, 0, 0))  # noqa: E731
    memory = pl.BlockSpec((1, 1, K, width), lambda b, h, c: (b, h, 0, c))
    values = pl.BlockSpec((1, 1, 1, width), lambda b, h, c: (b, h, 0, c))
    h, C, n = pl.pallas_call(
        functools.partial(_body, normalize, eps),
        grid=(B, H, V // width),
        in_specs=[
            per_head(8, common.LANES),
            per_head(1, K),
            per_head(1, K),
            values,
            memory,
            per_head(1, K),
        ],
        out_specs=[values, memory, per_head(1, K)],
        out_shape=[
            jax.ShapeDtypeStruct((B, H, 1, V), v.dtype),
            jax.ShapeDtypeStruct(C.shape, jnp.float32),
            jax.ShapeDtypeStruct((B, H, 1, K), jnp.float32),
        ],
        input_output_aliases={4: 1, 5: 2},
        compiler_params=common.compiler_params(
            ("parallel", "parallel", "arbitrary"), max(common.SCOPED_BYTES, vmem_bytes(K, V))
        ),
        cost_estimate=cost.step(B, H, K, V, v.dtype),
        interpret=interpret,
        name="mlstm_decode",
    )(factors, *(_head_first(x) for x in (q, k, v)), C, n[:, :, None])
    return _head_first(h), (C, n[:, :, 0], m)


def vmem_bytes(K: int, V: int) -> int:
    """VMEM that one step takes: old and new memory, each twice, and what turning q and k takes."""
    return 4 * 4 * K * _width(K, V) + 3 * 4 * K * K + (1 << 20)


def fits_vmem(K: int, V: int) -> bool:
    """Whether heads of these widths can take a step by this kernel on the chip at hand."""
    chip = tiles.current_chip()
    return chip is None or vmem_bytes(K, V) <= tiles.CHIPS[chip].vmem_bytes


def _factors(gates: pre.LogGates, m: jax.Array, max_state: bool) -> tuple[jax.Array, jax.Array]:
    """What the step multiplies with, `B H 8 128`, and the new m."""
    log_i, log_f = gates.log_i[:, 0], gates.log_f[:, 0]
    kept = log_f + m
    before = kept
    if gates.reset is not None:
        reset = gates.reset  # B 1, as the gates' B H
        kept, before = jnp.where(reset, pre.NEG, kept), jnp.where(reset, log_f, kept)
    m = jnp.maximum(before, log_i) if max_state else jnp.zeros_like(m)
    # Memories are read at a log-scale of at least READ_FLOOR: the query carries the difference.
    read = jnp.exp(m - jnp.maximum(m, pre.READ_FLOOR))
    rows = [jnp.exp(kept - m), jnp.exp(log_i - m), pre.lower_bound(m), read]
    rows = common.fill(jnp.stack(rows, axis=-1), 2, 8)
    return jnp.broadcast_to(rows[..., None], (*rows.shape, common.LANES)), m


def _width(K: int, V: int) -> int:
    """Columns of the memory that one step of the grid holds: all, or whole tiles that divide V."""
    if 4 * K * V <= BLOCK_BYTES or V % common.LANES:
        return V
    tiles = V // common.LANES
    fitting = [n for n in range(1, tiles + 1) if tiles % n == 0]
    fitting = [n for n in fitting if 4 * K * n * common.LANES <= BLOCK_BYTES]
    return common.LANES * max(fitting, default=1)


def _head_first(x: jax.Array) -> jax.Array:
    """`B 1 H K` to `B H 1 K`, and back."""
    return jnp.swapaxes(x, 1, 2)


def _body(normalize: bool, eps: float, factors, q, k, v, C_old, n_old, h, C, n):
    factor = lambda index: factors[0, 0, index : index + 1, :1]  # noqa: E731
    scale = q.shape[-1] ** -0.5 * factor(READ)
    query = q[0, 0].astype(jnp.float32) * scale
    key = k[0, 0].astype(jnp.float32) * factor(ADDED)
    memory = factor(KEPT) * C_old[0, 0] + column(key) * v[0, 0].astype(jnp.float32)
    C[0, 0] = memory

    # Once, however many blocks of columns there are: both are one buffer.
    @pl.when(pl.program_id(2) == 0)
    def _():
        n[0, 0] = factor(KEPT) * n_old[0, 0] + key

    u = jnp.sum(column(query) * memory, axis=0, keepdims=True)
    if normalize:
        d = jnp.sum(query * n[0, 0], axis=1, keepdims=True)
        u = u / (jnp.maximum(jnp.abs(d), factor(BOUND)) + eps)
    h[0, 0] = u.astype(h.dtype)
