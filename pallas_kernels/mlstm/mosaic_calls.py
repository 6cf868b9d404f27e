"""mLSTM forward and backward passes on a Hopper GPU, as launches of `states` and `outputs`."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.mlstm import gates, mosaic_outputs, mosaic_states
from pallas_kernels.mlstm.mosaic_blocks import SPLIT
from pallas_kernels.mlstm.mosaic_tiles import Outputs, States
from pallas_kernels.mlstm.options import Backward, Forward, Options


def forward(options: Options, packed, q, k, v, C, n, *, save: bool) -> Forward:
    """The forward pass; see `options.Kernels`."""
    weights = packed[:, :, gates.WRITE]
    C_starts, n_starts, C, n, _ = _states(options, packed, weights, k, v, C, n, None)
    normalize = options.normalize
    h, d = _outputs(options, "h", packed, q, k, v, C_starts, n_starts, v, normalize=normalize)
    d = d[:, :, :1] if normalize else None
    return Forward(h, C, n, *((d, C_starts, n_starts) if save else [None] * 3))


def backward(options: Options, packed, q, k, v, h, dh, C_starts, n_starts, dC, dn) -> Backward:
    """The backward pass; see `options.Kernels`."""
    dnorm = h is not None
    if dnorm:
        packed = gates.scale_normalizer(packed, h, dh)
    weights = packed[:, :, gates.READ] * (packed[:, :, gates.NORMALIZER] if dnorm else 0)
    C_ends, n_ends, dC, dn, scaling = _states(options, packed, weights, q, dh, dC, dn, C_starts)
    saved, ends = (C_starts, n_starts), (C_ends, n_ends)
    dq, q_dq = _outputs(options, "dq", packed, dh, v, k, *saved, q, dnorm=dnorm)
    dk, k_dk = _outputs(options, "dk", packed, v, dh, q, *ends, k, dnorm=dnorm)
    dv, _ = _outputs(options, "dv", packed, k, q, dh, *ends, v)
    dn_starts = jnp.concatenate([dn[:, :, None], n_ends[:, :, :-1]], axis=2)
    scaling = scaling.sum((3, 4)) + (dn_starts * n_starts).sum((3, 4))
    return Backward(dq, dk, dv, k_dk.sum(2), q_dq.sum(2), scaling, dC, dn)


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
    options: Options, packed, weights, lhs, rhs, C, n, starts: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Launches `states`; with `starts`, C of the forward pass at chunk starts, in reverse.

    Args:
        weights: `B H T`, of lhs in the sum n.

    Returns:
        C `B H N K V` and n `B H N 1 K` at chunk boundaries, the last C and n, and with `starts`
        the sums `B H N parts K` of the gradient of the log scale.
    """
    block: States = options.tile.states
    B, H, K, V = C.shape
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
    if starts is None:
        starts = jnp.zeros((1,) * 5, jnp.bfloat16)
    arrays = (packed, split(weights[:, :, None]), lhs, rhs, C, n, starts)
    name = "mlstm_dstates" if sizes.reversed else "mlstm_states"
    return mosaic_states.states(sizes, arrays, name=name)


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
    """Launches `outputs`; returns h, dq, dk or dv, `B T HW`, and its sums `B H parts T`."""
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
    other = gates.QUERY if later else gates.KEY
    columns = packed[:, :, jnp.array([gates.COARSE, other, gates.NORMALIZER, gates.SEGMENT])]
    parts = split(n) if normalize else jnp.zeros((1,) * 5, jnp.bfloat16)
    arrays = (packed, columns, lhs, rhs, values, C, n, parts, primal)
    return mosaic_outputs.outputs(s, arrays, name=f"mlstm_{name}")
