"""mLSTM forward and backward passes on a Hopper GPU, as launches of `states` and `outputs`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.mlstm import gpu_passes, mosaic_outputs, mosaic_states
from pallas_kernels.mlstm.mosaic_blocks import SPLIT
from pallas_kernels.mlstm.mosaic_tiles import Outputs, States
from pallas_kernels.mlstm.options import Options
from pallas_kernels.mlstm.packing import COARSE, KEY, NORMALIZER, QUERY, READ, SEGMENT, WRITE


def split(x: jax.Array) -> jax.Array:
    """`x`, `... 1 S` in float32, as the sum of `... 8 S` in bfloat16, of which three are not zero.

    A product with them, accumulated in float32, is as exact as one with `x`.
    """
    parts = []
    for _ in range(3):
        # Not a conversion to bfloat16 and back, which XLA may remove.
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part)
        x = x - part
    parts = jnp.concatenate(parts, axis=-2).astype(jnp.bfloat16)
    padding = [(0, 0)] * (x.ndim - 2) + [(0, SPLIT - 3), (0, 0)]
    return jnp.pad(parts, padding)


def _states(
    options: Options, packed, lhs, rhs, C, n, starts=None, *, dnorm: bool = False
) -> tuple[jax.Array, ...]:
    """Launches `states`; see `gpu_passes.Launches`."""
    block: States = options.tile.states
    B, H, _, _ = packed.shape
    K, V = (x.shape[2] // H for x in (lhs, rhs))
    if C is None:
        C, n = jnp.zeros((B, H, K, V), jnp.float32), jnp.zeros((B, H, 1, K), jnp.float32)
    sizes = mosaic_states.Sizes(
        B=B,
        T=packed.shape[3],
        H=H,
        K=K,
        V=V,
        L=options.chunk,
        reversed=starts is not None,
        interpret=mosaic.interpreter(options.interpret),
        **block._asdict(),
    )
    # The weights of lhs in the sum n.
    weights = packed[:, :, WRITE if starts is None else READ]
    if starts is not None:
        weights = weights * packed[:, :, NORMALIZER] if dnorm else jnp.zeros_like(weights)
    C_starts = jnp.zeros((1,) * 5, jnp.bfloat16) if starts is None else starts[0]
    arrays = (packed, split(weights[:, :, None]), lhs, rhs, C, n, C_starts)
    name = "mlstm_dstates" if sizes.reversed else "mlstm_states"
    C_out, n_out, C, n, scaling = mosaic_states.states(sizes, arrays, name=name)
    if starts is not None:  # the kernel sums dC * C only
        dn_starts = jnp.concatenate([n[:, :, None], n_out[:, :, :-1]], axis=2)
        scaling = scaling.sum((3, 4)) + (dn_starts * starts[1]).sum((3, 4))
    return C_out, n_out, C, n, scaling[..., None]


def _outputs(
    options: Options,
    name: str,
    packed,
    lhs,
    rhs,
    values,
    C,
    n,
    primal,
    *,
    normalize: bool = False,
    dnorm: bool = False,
) -> tuple[jax.Array, ...]:
    """Launches `outputs`; see `gpu_passes.Launches`."""
    later, transposed = name in ("dk", "dv"), name in ("dq", "dk")
    block: Outputs = options.tile.to_k if transposed else options.tile.to_v
    B, H, _, T = packed.shape
    sizes: dict[str, Any] = block._asdict()
    s = mosaic_outputs.Sizes(
        B=B,
        T=T,
        H=H,
        A=lhs.shape[2] // H,
        W=values.shape[2] // H,
        L=options.chunk,
        later=later,
        transposed=transposed,
        normalize=normalize,
        sums=normalize or transposed,
        dnorm=dnorm,
        resets=options.resets,
        eps=options.eps,
        interpret=mosaic.interpreter(options.interpret),
        **sizes,
    )
    other = QUERY if later else KEY
    columns = packed[:, :, jnp.array([COARSE, other, NORMALIZER, SEGMENT])]
    parts = split(n) if normalize else jnp.zeros((1,) * 5, jnp.bfloat16)
    arrays = (packed, columns, lhs, rhs, values, C, n, parts, primal)
    return mosaic_outputs.outputs(s, arrays, name=f"mlstm_{name}")


LAUNCHES = gpu_passes.Launches(_states, _outputs)
forward = functools.partial(gpu_passes.forward, LAUNCHES)
backward = functools.partial(gpu_passes.backward, LAUNCHES)
