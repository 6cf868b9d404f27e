"""One step of the mLSTM on a GPU: reads the state once and writes the new one once.

Source: arXiv:2405.04517, section 2.3.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import gpu
from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm.options import Options, State

COLUMNS = 32
"""Columns of C per program; few, so that even a batch of one occupies all multiprocessors."""

MAX_BLOCK_K = 256
"""Upper limit of BK, the part of K per iteration; bounds the registers of a program."""

MIN_BLOCK_K = 16
"""Lower limit of BK: each thread has elements of C that no other has, and so reads before writing
even where C and the new C share a buffer."""


def step(options: Options, q, k, v, gates: pre.LogGates, state: State) -> tuple[jax.Array, State]:
    """The step kernel; see `options.Kernels`."""
    C, n, m = state
    factors, m = pre.step_factors(gates, m, max_state=options.max_state)
    B, H, K, V = C.shape
    shape = jax.ShapeDtypeStruct
    # Every program of a head reads n, and one writes the new n. The concatenation has a buffer of
    # its own, so they share no memory even where a loop updates stacked states in place.
    factors_n = jnp.concatenate((jnp.stack(factors, axis=-1), n), axis=-1)
    h, C, n = gpu.call(
        _kernel,
        (factors_n, q, k, v, C),
        (shape(v.shape, v.dtype), shape(C.shape, jnp.float32), shape(n.shape, jnp.float32)),
        name="mlstm_decode",
        grid=(B * H, triton.cdiv(V, COLUMNS)),
        num_warps=4,
        num_stages=3,
        target=options.target,
        interpret=bool(options.interpret),
        K=K,
        V=V,
        BK=max(MIN_BLOCK_K, min(MAX_BLOCK_K, triton.next_power_of_2(K))),
        BV=COLUMNS,
        SCALE=K**-0.5,
        NORMALIZE=options.normalize,
        EPS=options.eps,
    )
    return h, (C, n, m)


@triton.jit
@no_type_check
def _kernel(
    factors,  # B H 4+K, float32: four in the order of `gates.StepFactors`, then n
    q,  # B H K
    k,  # B H K
    v,  # B H V
    C,  # B H K V, float32
    h,  # B H V
    C_out,  # B H K V, float32
    n_out,  # B H K, float32
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BV + tl.arange(0, BV)
    factors += head * (4 + K)
    n = factors + 4
    decay = tl.load(factors)
    write = tl.load(factors + 1)
    read = tl.load(factors + 3) * SCALE
    mask_v = offs_v < V
    value = tl.load(v + head * V + offs_v, mask_v, other=0.0).to(tl.float32)
    u = tl.zeros((BV,), tl.float32)
    d = 0.0
    for start in range(0, K, BK):
        offs_k = start + tl.arange(0, BK)
        mask_k = offs_k < K
        query = tl.load(q + head * K + offs_k, mask_k, other=0.0).to(tl.float32) * read
        key = tl.load(k + head * K + offs_k, mask_k, other=0.0).to(tl.float32) * write
        n_new = decay * tl.load(n + offs_k, mask_k, other=0.0) + key
        d += tl.sum(query * n_new)
        if tl.program_id(1) == 0:
            tl.store(n_out + head * K + offs_k, n_new, mask_k)
        tile = head * K * V + offs_k[:, None] * V + offs_v[None, :]
        inside = mask_k[:, None] & mask_v[None, :]
        C_new = decay * tl.load(C + tile, inside, other=0.0) + key[:, None] * value[None, :]
        tl.store(C_out + tile, C_new, inside)
        u += tl.sum(query[:, None] * C_new, axis=0)
    if NORMALIZE:
        bound = tl.load(factors + 2)
        u = u / (tl.maximum(tl.abs(d), bound) + EPS)
    tl.store(h + head * V + offs_v, u.to(h.dtype.element_ty), mask_v)
