"""With what arrays the sLSTM's Triton kernels are called, and what `vmap` makes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import common, gpu
from pallas_kernels.slstm import triton_resident, triton_streamed, triton_tiles


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known of a call while tracing."""

    forget_gate: str
    save_gates: bool
    interpret: bool
    target: str | None


def forward(options: Options, *, save: bool):
    """A function of x `B T 4 H K`, r `H K 4 K`, b `H 4 K`, first `4 B H K` and flags `B T` or None.

    It returns h `B T+1 H K` before the first step and after each, in the dtype of x; the last state
    `4 B H K`; and for a gradient c, n and m as each step sees them `B T 3 H K`, and the gates
    `B T 4 H K`, both in float32.
    """
    kernel = functools.partial(_forward, options, save)
    axes = ((0, 3), (None, 0), (None, 0), (1, 2), (0, None))
    out_axes = ((0, 2), (1, 2), (0, 3), (0, 3))
    saved = 2 + save + (save and options.save_gates)
    return common.folding(kernel, axes, out_axes[:saved])


def _forward(options: Options, save: bool, x, r, b, first, flags):
    B, T, _, H, K = x.shape
    tile = triton_tiles.forward(K, x.dtype)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    kept, with_gates = (B, T, 3, H, K) if save else (1,), save and options.save_gates
    shapes = (
        jax.ShapeDtypeStruct((B, T + 1, H, K), x.dtype),
        f32(first.shape),
        f32(kept),
        f32(x.shape if with_gates else (1,)),
    )
    found = _call(
        options,
        tile,
        "forward",
        (x, r, b, first, _or_nothing(flags)),
        shapes,
        sizes=(B, T, H, K),
        FLAGGED=flags is not None,
        SAVE=save,
        SAVE_GATES=with_gates,
    )
    return found[: 2 + save + with_gates]


def backward(options: Options):
    """A function of gates `B T 4 H K`, r `H K 4 K`, seen `B T 3 H K`, dh `B T H K`, dlast `4 B H K`
    (of c, n and h after the last step, and rho) and flags.

    It returns the gradients of x, in the dtype of dh and 0 where masked, and those of c, n and h
    before the first step with what is left of rho.
    """
    axes = ((0, 3), (None, 0), (0, 3), (0, 2), (1, 2), (0, None))
    return common.folding(functools.partial(_backward, options), axes, ((0, 3), (1, 2)))


def _backward(options: Options, gates, r, seen, dh, dlast, flags):
    B, T, _, H, K = gates.shape
    return _call(
        options,
        triton_tiles.backward(K, dh.dtype),
        "backward",
        (gates, r, seen, dh, dlast, _or_nothing(flags)),
        (
            jax.ShapeDtypeStruct(gates.shape, dh.dtype),
            jax.ShapeDtypeStruct(dlast.shape, jnp.float32),
        ),
        sizes=(B, T, H, K),
        FLAGGED=flags is not None,
    )


def _or_nothing(flags: jax.Array | None) -> jax.Array:
    return jnp.zeros((1,), jnp.int32) if flags is None else flags


def _call(options: Options, tile, name: str, arrays, out_shape, *, sizes, **settings):
    kernels = triton_resident if tile.resident else triton_streamed
    blocks = {} if tile.resident else {"BLOCK": tile.block, "INNER": tile.inner}
    if not tile.resident and name == "forward":
        blocks["KEPT"] = tile.kept
    B, T, H, K = sizes
    return gpu.call(
        getattr(kernels, name),
        arrays,
        out_shape,
        name=f"slstm_{name}",
        grid=(H, -(-B // triton_tiles.ROWS)),
        num_warps=tile.warps,
        num_stages=tile.stages,
        target=options.target,
        interpret=options.interpret,
        B=B,
        T=T,
        H=H,
        K=K,
        SIGMOID=options.forget_gate == "sigmoid",
        UPCAST=options.interpret,
        **blocks,
        **settings,
    )
