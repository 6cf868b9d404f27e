"""One sLSTM step as a TPU kernel: weights are read once, the state is updated in place.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tpu
from pallas_kernels.slstm import tpu_kernels
from pallas_kernels.slstm.options import MASKED, RESET, Options, State


def step(
    options: Options, x, r, b, state: State, flags: jax.Array | None
) -> tuple[jax.Array, State]:
    """h and the state after one step; under `jit`, a donated state is updated in place.

    The kernel takes r as `H K 4K`, which needs a relayout by XLA; a loop over steps hoists it.
    """
    B, _, H, K = x.shape
    arguments = [jnp.transpose(x, (2, 0, 1, 3)), r, b]
    arguments = [a.reshape(H, -1, 4 * K) for a in arguments]
    specs = [pl.BlockSpec((1, *a.shape[1:]), lambda h: (h, 0, 0)) for a in arguments]
    if flags is not None:
        arguments.append(flags)
        specs.append(pl.BlockSpec((B, 1), lambda h: (0, 0)))
    state_index = len(arguments)
    leaf = pl.BlockSpec((B, H, K), lambda h: (0, 0, 0))
    out_shape = [jax.ShapeDtypeStruct((B, H, K), jnp.float32)] * 4
    arguments += state
    gate = options.forget_gate
    c, n, h, m = pl.pallas_call(
        functools.partial(_body, forget_gate=gate, flagged=flags is not None),
        grid=(H,),
        in_specs=specs + [leaf] * 4,
        out_specs=[leaf] * 4,
        out_shape=out_shape,
        input_output_aliases={state_index + index: index for index in range(4)},
        compiler_params=tpu.compiler_params(("arbitrary",), options.tile.vmem_bytes),
        cost_estimate=tpu_kernels.cost(
            "slstm_decode", H * B * K, K, gate, (*arguments, *out_shape)
        ),
        interpret=options.interpret,
        name="slstm_decode",
    )(*arguments)
    return h.astype(x.dtype), (c, n, h, m)


def _body(x, r, b, *refs, forget_gate, flagged):
    flags, refs = (refs[0], refs[1:]) if flagged else (None, refs)
    old_refs, new_refs = refs[:4], refs[4:]
    # Blocks of the state contain all heads and stay in VMEM for the full grid.
    head = pl.program_id(0)
    K = r.shape[1]
    state = [ref[:, head] for ref in old_refs]
    reset, masked = None, None
    if flags is not None:
        bits = jnp.broadcast_to(flags[...], (x.shape[1], K))
        reset, masked = (bits & bit != 0 for bit in (RESET, MASKED))
    c, n, h, m = state if reset is None else [jnp.where(reset, 0.0, leaf) for leaf in state]
    recurrent = tpu.product(h.astype(x.dtype), r[0].astype(x.dtype))
    gates = x[0].astype(jnp.float32) + b[0] + recurrent
    new_state = tpu_kernels.cell_forward(gates, c, n, m, forget_gate)
    if masked is not None:
        # A select, so that a NaN in the x of a masked sequence does not reach the state.
        new_state = [jnp.where(masked, old, new) for old, new in zip(state, new_state, strict=True)]
    for ref, leaf in zip(new_refs, new_state, strict=True):
        ref[:, head] = leaf
