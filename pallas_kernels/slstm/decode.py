"""One step of the sLSTM as a TPU kernel: the weights are read once, the memory is written in place.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import common
from pallas_kernels.slstm import cost, sizes, tpu_forward
from pallas_kernels.slstm.contract import MASKED, RESET, State, check_arguments


def slstm_decode(
    x: jax.Array,
    r: jax.Array,
    b: jax.Array,
    state: State,
    reset: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    forget_gate: str = "sigmoid",
    vmem_bytes: int = common.SCOPED_BYTES,
) -> tuple[jax.Array, State]:
    """One step, without a gradient; `vjp.slstm` with T = 1 is the same step and has one.

    The kernel takes the memory as it lies and writes it in place: donate the state to the function
    that is compiled. It takes r as `H K 4K`, which XLA has to lay out anew; a loop over steps does
    so once, before the first of them.

    Args:
        x: `B 4 H K`, pre-activations of (i, f, z, o); float32 or bfloat16.
        r: `H K 4 K`, recurrent weights (input, gate, output); multiplied in the dtype of x.
        b: `H 4 K`, the bias of the four gates, in float32.
        state: the memory before the step.
        reset: `B`; where True, the memory is taken as empty.
        mask: `B`; where False, the state is left as it is, h is 0 and x is not read.
        forget_gate: "sigmoid" or "exp".
        vmem_bytes: what the kernel may use of the chip's VMEM.

    Returns h `B H K` in the dtype of x, and the memory after the step.

    Raises:
        ValueError: shapes that do not fit, a dtype or a forget gate that is not known, a state and
            weights that exceed VMEM.
    """
    check_arguments("slstm_decode", x[:, None], r, state, forget_gate)
    B, _, H, K = x.shape
    needed = decode_vmem_bytes(B, H, K, x.dtype, r.dtype)
    if needed > vmem_bytes:
        raise ValueError(
            f"slstm_decode: B={B}, H={H}, K={K} need {needed} bytes of VMEM and may use "
            f"{vmem_bytes}; use fewer rows at a time, or `slstm` with T = 1."
        )
    arguments = [jnp.transpose(x, (2, 0, 1, 3)), r, b]
    arguments = [a.reshape(H, -1, 4 * K) for a in arguments]
    specs = [pl.BlockSpec((1, *a.shape[1:]), lambda h: (h, 0, 0)) for a in arguments]
    if reset is not None or mask is not None:
        arguments.append(_flags(B, reset, mask))
        specs.append(pl.BlockSpec((B, 1), lambda h: (0, 0)))
    first = len(arguments)
    leaf = pl.BlockSpec((B, H, K), lambda h: (0, 0, 0))
    out_shape = [jax.ShapeDtypeStruct((B, H, K), jnp.float32)] * 4
    arguments += [leaf.astype(jnp.float32) for leaf in state]
    c, n, h, m = pl.pallas_call(
        functools.partial(_body, forget_gate=forget_gate, flagged=first == 4),
        grid=(H,),
        in_specs=specs + [leaf] * 4,
        out_specs=[leaf] * 4,
        out_shape=out_shape,
        input_output_aliases={first + index: index for index in range(4)},
        compiler_params=common.compiler_params(("arbitrary",), vmem_bytes),
        cost_estimate=cost.forward(H * B * K, K, forget_gate, (*arguments, *out_shape)),
        interpret=common.interpreter(),
        name="slstm_decode",
    )(*arguments)
    output = h if mask is None else jnp.where(mask[:, None, None], h, 0)
    return output.astype(x.dtype), (c, n, h, m)


def decode_vmem_bytes(B: int, H: int, K: int, dtype: jnp.dtype, r_dtype: jnp.dtype) -> int:
    """VMEM that `slstm_decode` needs: the memory of all heads, and the weights of two."""
    B, H = (common.round_up(size, sizes.ROWS) for size in (B, H))
    K = common.round_up(K, common.lanes())
    weights = 2 * 4 * K * K * jnp.dtype(r_dtype).itemsize
    converted = 4 * K * K * jnp.dtype(dtype).itemsize
    return weights + converted + 2 * 2 * 4 * B * H * K * 4 + B * K * 4 * (2 * 4 + 16)


def _flags(B: int, reset: jax.Array | None, mask: jax.Array | None) -> jax.Array:
    """`B 1`, with the bits of `contract`."""
    flags = jnp.zeros((B,), jnp.int32)
    if reset is not None:
        flags = jnp.where(reset, RESET, flags)
    if mask is not None:
        flags = jnp.where(mask, flags, MASKED)
    return flags[:, None]


def _body(x, r, b, *refs, forget_gate, flagged):
    flags, refs = (refs[0], refs[1:]) if flagged else (None, refs)
    before, after = refs[:4], refs[4:]
    head = pl.program_id(0)
    K = r.shape[1]
    state = [leaf[:, head] for leaf in before]
    reset, masked = None, None
    if flags is not None:
        wide = jnp.broadcast_to(flags[...], (x.shape[1], K))
        reset, masked = (wide & bit != 0 for bit in (RESET, MASKED))
    c, n, h, m = state if reset is None else [jnp.where(reset, 0.0, leaf) for leaf in state]
    recurrent = common.product(h.astype(x.dtype), r[0].astype(x.dtype))
    gates = x[0].astype(jnp.float32) + b[0] + recurrent
    new = tpu_forward.step(gates, c, n, m, forget_gate)
    if masked is not None:
        # What a masked step computes, from whatever x holds, is not looked at.
        new = [jnp.where(masked, old, leaf) for old, leaf in zip(state, new, strict=True)]
    for ref, leaf in zip(after, new, strict=True):
        ref[:, head] = leaf
