"""One step of the mLSTM on a GPU: the memory is read once and updated in place.

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
"""Columns of the memory of one program: a batch of one still gives every multiprocessor some."""

ROWS = 256
"""Most rows of the memory that a program has in registers, and on their way, at once."""


def takes(K: int, V: int) -> bool:
    """Any widths: what is missing in a block is masked."""
    del K, V
    return True


def step(options: Options, q, k, v, gates: pre.LogGates, state: State) -> tuple[jax.Array, State]:
    """h and the state after one step; see `options.Kernels`."""
    C, n, m = state
    factors, m = pre.step_factors(gates, m, max_state=options.max_state)
    B, H, K, V = C.shape
    shape = jax.ShapeDtypeStruct
    # n is not written in place: programs of other columns read the old one.
    h, n, C = gpu.call(
        _kernel,
        (jnp.stack(factors, axis=-1), q, k, v, C, n),
        (shape(v.shape, v.dtype), shape(n.shape, jnp.float32), shape(C.shape, jnp.float32)),
        name="mlstm_decode",
        grid=(B * H, triton.cdiv(V, COLUMNS)),
        aliases={4: 2},
        num_warps=4,
        num_stages=3,
        target=options.target,
        interpret=bool(options.interpret),
        K=K,
        V=V,
        BK=min(ROWS, triton.next_power_of_2(K)),
        BV=COLUMNS,
        SCALE=K**-0.5,
        NORMALIZE=options.normalize,
        EPS=options.eps,
    )
    return h, (C, n, m)


@triton.jit
@no_type_check
def _kernel(
    factors,  # B H 4, float32, in the order of `gates.StepFactors`
    q,  # B H K
    k,  # B H K
    v,  # B H V
    C,  # B H K V, float32, in place
    n_old,  # B H K, float32
    h,  # B H V
    n,  # B H K
    C_again,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    at_v = tl.program_id(1) * BV + tl.arange(0, BV)
    kept = tl.load(factors + head * 4)
    added = tl.load(factors + head * 4 + 1)
    read = tl.load(factors + head * 4 + 3) * SCALE
    in_v = at_v < V
    values = tl.load(v + head * V + at_v, in_v, other=0.0).to(tl.float32)
    u = tl.zeros((BV,), tl.float32)
    d = 0.0
    for start in range(0, K, BK):
        at_k = start + tl.arange(0, BK)
        in_k = at_k < K
        query = tl.load(q + head * K + at_k, in_k, other=0.0).to(tl.float32) * read
        key = tl.load(k + head * K + at_k, in_k, other=0.0).to(tl.float32) * added
        new = kept * tl.load(n_old + head * K + at_k, in_k, other=0.0) + key
        d += tl.sum(query * new)
        if tl.program_id(1) == 0:
            tl.store(n + head * K + at_k, new, in_k)
        tile = head * K * V + at_k[:, None] * V + at_v[None, :]
        inside = in_k[:, None] & in_v[None, :]
        memory = kept * tl.load(C + tile, inside, other=0.0) + key[:, None] * values[None, :]
        tl.store(C + tile, memory, inside)
        u += tl.sum(query[:, None] * memory, axis=0)
    if NORMALIZE:
        bound = tl.load(factors + head * 4 + 2)
        u = u / (tl.maximum(tl.abs(d), bound) + EPS)
    tl.store(h + head * V + at_v, u.to(h.dtype.element_ty), in_v)
