"""One step of the sLSTM on a GPU: weights are read once, the memory is written where it stood.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2.
"""

import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import common, gpu
from pallas_kernels.gpu import divisor
from pallas_kernels.slstm import triton_tiles
from pallas_kernels.slstm.options import Options, State
from pallas_kernels.slstm.triton_step import read_flags
from pallas_kernels.slstm.triton_step import step as one_step
from pallas_kernels.triton_math import product

CELLS = 32
"""Cells of one program, which reads their weights from all cells of the head."""


def step(options: Options, x, r, b, state: State, flags: jax.Array | None) -> State:
    """The state after one step; under `jit` with it donated c, n and m are updated in place.

    h is not, as programs of other cells still read the old one.

    Args:
        x: `B 4 H K`.
        r: `H K 4 K`, in any dtype; multiplied in that of x.
        b: `H 4 K`, float32.
        flags: `B 1`, or None.
    """
    K, width = x.shape[-1], options.tile.width
    x, b = common.pad(x, 3, width), common.pad(b, 2, width)
    r = common.pad(common.pad(r, 3, width), 1, width)
    c, n, h, m = (common.pad(leaf, 2, width) for leaf in state)
    axes = ((0, 2), (None, 0), (None, 0), (0, None), *[(0, 1)] * 4)
    kernel = common.fold_vmap(functools.partial(_decode, options), axes, ((0, 1),) * 4)
    h, c, n, m = (leaf[..., :K] for leaf in kernel(x, r, b, flags, h, c, n, m))
    return c, n, h, m


def _decode(options: Options, x, r, b, flags, h, c, n, m):
    B, _, H, K = x.shape
    given = jnp.zeros((1,), jnp.int32) if flags is None else flags
    cells = divisor(K, CELLS)
    return gpu.call(
        _kernel,
        (x, r, b, given, h, c, n, m),
        [jax.ShapeDtypeStruct(h.shape, jnp.float32)] * 4,
        name="slstm_decode",
        grid=(H, -(-B // triton_tiles.ROWS), K // cells),
        aliases={5: 1, 6: 2, 7: 3},
        num_warps=4,
        num_stages=3,
        target=options.target,
        interpret=bool(options.interpret),
        B=B,
        H=H,
        K=K,
        BLOCK=cells,
        INNER=divisor(K, 64),
        FLAGGED=flags is not None,
        SIGMOID=options.forget_gate == "sigmoid",
        UPCAST=bool(options.interpret),
    )


@triton.jit
@no_type_check
def _kernel(
    x,  # B 4 H K
    r,  # H K 4 K
    bias,  # H 4 K, float32
    flags,  # B, int32
    h,  # B H K, float32
    c,  # B H K, float32, in place
    n,  # B H K, float32, in place
    m,  # B H K, float32, in place
    h_after,  # B H K, float32
    c_again,
    n_again,
    m_again,
    B: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    FLAGGED: tl.constexpr,
    SIGMOID: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head = tl.program_id(0)
    b = (tl.program_id(1) * 16 + tl.arange(0, 16)).to(tl.int64)
    inside = (b < B)[:, None]
    cells = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    others = tl.arange(0, INNER)
    reset, masked = read_flags(flags, b, inside, 1, FLAGGED)
    rows = (b * (H * K) + head * K)[:, None]
    i = tl.zeros((16, BLOCK), tl.float32)
    f = tl.zeros((16, BLOCK), tl.float32)
    z = tl.zeros((16, BLOCK), tl.float32)
    o = tl.zeros((16, BLOCK), tl.float32)
    dtype = x.dtype.element_ty
    for start in range(0, K, INNER):
        inner = start + others
        read = inside & (reset == 0)
        operand = tl.load(h + rows + inner[None, :], read, other=0.0).to(dtype)
        weights = r + head * (4 * K * K) + inner[:, None] * (4 * K) + cells[None, :]
        i += product(operand, tl.load(weights).to(dtype), UPCAST)
        f += product(operand, tl.load(weights + K).to(dtype), UPCAST)
        z += product(operand, tl.load(weights + 2 * K).to(dtype), UPCAST)
        o += product(operand, tl.load(weights + 3 * K).to(dtype), UPCAST)
    at = rows + cells[None, :]
    state = (
        tl.load(c + at, inside, other=0.0),
        tl.load(n + at, inside, other=0.0),
        tl.load(h + at, inside, other=0.0),
        tl.load(m + at, inside, other=0.0),
    )
    x += (b * (4 * H * K) + head * K)[:, None] + cells[None, :]
    bias += head * (4 * K) + cells[None, :]
    pointers, marks = (x, bias, h, h), (reset, masked, inside)  # nothing is saved
    new_c, new_n, new_h, new_m = one_step(
        (i, f, z, o), state, pointers, marks, H * K, K, FLAGGED, False, False, SIGMOID
    )
    tl.store(c + at, new_c, inside)
    tl.store(n + at, new_n, inside)
    tl.store(m + at, new_m, inside)
    tl.store(h_after + at, new_h, inside)
