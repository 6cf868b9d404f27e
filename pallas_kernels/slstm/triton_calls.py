"""Calls of the sLSTM Triton kernels: padding, output shapes, launch options and `vmap`."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import common, gpu
from pallas_kernels.slstm import triton_resident, triton_streamed
from pallas_kernels.slstm.options import RESET, Forward, Inputs, Options, State
from pallas_kernels.slstm.triton_tiles import BATCH_BLOCK


def pad(options: Options, x, r, b, state: State, flags) -> Inputs:
    """x `B T 4 H K`, r `H K 4 K`, b `4 H K`, state `4 B H K`, flags `B T`, with K padded."""
    width = options.tile.width
    r = common.pad(common.pad(r, 3, width), 1, width)
    b = jnp.swapaxes(common.pad(b, 2, width), 0, 1)
    initial = jnp.stack([common.pad(leaf, 2, width) for leaf in state])
    return Inputs(common.pad(x, 4, width), r, b, initial, flags)


def unpad(h: jax.Array, final: jax.Array, shape) -> tuple[jax.Array, State]:
    """h and the state, from `B T H K` and `4 B H K`; `shape` is that of x."""
    K = shape[-1]
    c, n, h_final, m = (leaf[..., :K] for leaf in final)
    return h[..., :K], (c, n, h_final, m)


def forward(options: Options, args: Inputs, *, save: bool) -> Forward:
    """The forward pass over all steps.

    Residuals: h `B T+1 H K` before the first step and after each, in the dtype of x; c, n and m
    before each step `B T 3 H K`; and with `options.save_gates` the gates `B T 4 H K`.
    """
    axes = ((0, 3), (None, 0), (None, 1), (1, 2), (0, None))
    out_axes = ((0, 2), (1, 2), (0, 3), (0, 3))[: 2 + save + (save and options.save_gates)]
    x, r, *rest = args
    kernel = common.fold_vmap(functools.partial(_forward, options, save=save), axes, out_axes)
    h, final, *saved = kernel(x, r.astype(x.dtype), *rest)
    cnm, gates = (*saved, None, None)[:2]
    return Forward(h[:, 1:], final, h if save else None, cnm, gates)


def _forward(options: Options, x, r, b, initial, flags, *, save: bool):
    B, T, _, H, K = x.shape
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    save_gates = save and options.save_gates
    h, final, *saved = _call(
        options,
        "forward",
        (x, r, jnp.swapaxes(b, 0, 1), jnp.swapaxes(initial, 0, 1), _flags_or_dummy(flags)),
        (
            jax.ShapeDtypeStruct((B, T + 1, H, K), x.dtype),
            f32((B, 4, H, K)),
            # A Triton kernel has a fixed number of results: unused ones have a single element.
            f32((B, T, 3, H, K) if save else (1,)),
            f32(x.shape if save_gates else (1,)),
        ),
        sizes=(B, T, H, K),
        FLAGGED=flags is not None,
        SAVE=save,
        SAVE_GATES=save_gates,
    )
    return h, jnp.swapaxes(final, 0, 1), *saved[: save + save_gates]


def h_before(h: jax.Array, flags: jax.Array | None) -> jax.Array:
    """h before each step, after its reset: `B T H K`, from `B T+1 H K`."""
    before_reset = h[:, :-1]
    if flags is None:
        return before_reset
    return jnp.where((flags & RESET != 0)[..., None, None], 0, before_reset)


def backward(options: Options, gates, r, cnm, dh, dfinal, flags) -> tuple[jax.Array, jax.Array]:
    """The backward pass over all steps.

    Args:
        dh: `B T H K`.
        dfinal: `4 B H K`, gradients of c, n and h after the last step, and rho.

    Returns the gradient of x, in the dtype of dh and 0 where masked; and dc, dn, dh and rho before
    the first step, `4 B H K`.
    """
    axes = ((0, 3), (None, 0), (0, 3), (0, 2), (1, 2), (0, None))
    kernel = common.fold_vmap(functools.partial(_backward, options), axes, ((0, 3), (1, 2)))
    return kernel(gates, r, cnm, dh, dfinal, flags)


def _backward(options: Options, gates, r, cnm, dh, dfinal, flags):
    B, T, _, H, K = gates.shape
    dx, dinitial = _call(
        options,
        "backward",
        (gates, r, cnm, dh, jnp.swapaxes(dfinal, 0, 1), _flags_or_dummy(flags)),
        (
            jax.ShapeDtypeStruct(gates.shape, dh.dtype),
            jax.ShapeDtypeStruct((B, 4, H, K), jnp.float32),
        ),
        sizes=(B, T, H, K),
        FLAGGED=flags is not None,
    )
    return dx, jnp.swapaxes(dinitial, 0, 1)


def _flags_or_dummy(flags: jax.Array | None) -> jax.Array:
    return jnp.zeros((1,), jnp.int32) if flags is None else flags


def _call(options: Options, name: str, arrays, out_shape, *, sizes, **settings):
    tile = getattr(options.tile, name)
    kernels = triton_resident if tile.resident else triton_streamed
    blocks = {} if tile.resident else {"BLOCK": tile.block, "INNER": tile.inner}
    if not tile.resident and name == "forward":
        blocks["CACHED"] = tile.cached
    B, T, H, K = sizes
    return gpu.call(
        getattr(kernels, name),
        arrays,
        out_shape,
        name=f"slstm_{name}",
        grid=(H, -(-B // BATCH_BLOCK)),
        sizes=(B, T),
        num_warps=tile.warps,
        num_stages=tile.stages,
        target=options.target,
        interpret=bool(options.interpret),
        H=H,
        K=K,
        LARGE=BATCH_BLOCK * 4 * (T + 1) * H * K >= 1 << 31,
        SIGMOID=options.forget_gate == "sigmoid",
        UPCAST=bool(options.interpret),
        **blocks,
        **settings,
    )
