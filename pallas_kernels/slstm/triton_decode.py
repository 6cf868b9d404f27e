"""One sLSTM step as a Triton kernel, which reads the weights once.

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
from pallas_kernels.slstm.triton_step import read_flags, step_forward
from pallas_kernels.triton_math import product

CELLS = 32
"""Output cells per program, which reads their weights from all cells of the head."""


def step(
    options: Options, x, r, b, state: State, flags: jax.Array | None
) -> tuple[jax.Array, State]:
    """h `B H K` in the dtype of x, and the state after one step.

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
    kernel = common.fold_vmap(functools.partial(_decode, options), axes, ((0, 1),) * 5)
    out, h, c, n, m = (leaf[..., :K] for leaf in kernel(x, r, b, flags, h, c, n, m))
    return out, (c, n, h, m)


def _decode(options: Options, x, r, b, flags, h, c, n, m):
    B, _, H, K = x.shape
    flags_or_dummy = jnp.zeros((1,), jnp.int32) if flags is None else flags
    cells = divisor(K, CELLS)
    # Every program of a head reads h, and each writes a part of the new h. The concatenation has a
    # buffer of its own, so they share no memory even where a loop updates stacked states in place.
    x_h = jnp.concatenate((x, h[:, None].astype(x.dtype)), axis=1)
    return gpu.call(
        _kernel,
        (x_h, r, b, flags_or_dummy, h, c, n, m),
        # h twice: where a loop stacks a result that is also used otherwise, XLA of jax 0.11 calls
        # the kernel twice.
        [jax.ShapeDtypeStruct(h.shape, dtype) for dtype in (x.dtype, *[jnp.float32] * 4)],
        name="slstm_decode",
        grid=(H, -(-B // triton_tiles.BATCH_BLOCK), K // cells),
        sizes=(B,),
        num_warps=4,
        num_stages=3,
        target=options.target,
        interpret=bool(options.interpret),
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
    x,  # B 5 H K: i, f, z and o without the recurrent part, then h, the operand of r
    r,  # H K 4 K
    bias,  # H 4 K, float32
    flags,  # B, int32
    h,  # B H K, float32; of h, c, n and m a program reads and writes its own cells only
    c,
    n,
    m,
    B,
    out,  # B H K: the new h, in the dtype of x
    h_out,  # B H K, float32, like the next three
    c_out,
    n_out,
    m_out,
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
    in_batch = (b < B)[:, None]
    cells = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, INNER)
    reset, masked = read_flags(flags, b, in_batch, 1, FLAGGED)
    head_offsets = (b * (H * K) + head * K)[:, None]
    i = tl.zeros((16, BLOCK), tl.float32)
    f = tl.zeros((16, BLOCK), tl.float32)
    z = tl.zeros((16, BLOCK), tl.float32)
    o = tl.zeros((16, BLOCK), tl.float32)
    dtype = x.dtype.element_ty
    x += (b * (5 * H * K) + head * K)[:, None]
    for start in range(0, K, INNER):
        k = start + inner
        h_mask = in_batch & (reset == 0)
        operand = tl.load(x + 4 * H * K + k[None, :], h_mask, other=0.0)
        weights = r + head * (4 * K * K) + k[:, None] * (4 * K) + cells[None, :]
        i += product(operand, tl.load(weights).to(dtype), UPCAST)
        f += product(operand, tl.load(weights + K).to(dtype), UPCAST)
        z += product(operand, tl.load(weights + 2 * K).to(dtype), UPCAST)
        o += product(operand, tl.load(weights + 3 * K).to(dtype), UPCAST)
    offsets = head_offsets + cells[None, :]
    state = (
        tl.load(c + offsets, in_batch, other=0.0),
        tl.load(n + offsets, in_batch, other=0.0),
        tl.load(h + offsets, in_batch, other=0.0),
        tl.load(m + offsets, in_batch, other=0.0),
    )
    x += cells[None, :]
    bias += head * (4 * K) + cells[None, :]
    # Without SAVE and SAVE_GATES the last two pointers, here h, are not used.
    pointers, masks = (x, bias, h, h), (reset, masked, in_batch)
    new_c, new_n, new_h, new_m = step_forward(
        (i, f, z, o), state, pointers, masks, H * K, K, FLAGGED, False, False, SIGMOID
    )
    tl.store(out + offsets, new_h.to(dtype), in_batch)
    tl.store(h_out + offsets, new_h, in_batch)
    tl.store(c_out + offsets, new_c, in_batch)
    tl.store(n_out + offsets, new_n, in_batch)
    tl.store(m_out + offsets, new_m, in_batch)
