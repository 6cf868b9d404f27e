"""sLSTM on Pallas or Triton kernels, with gradients; takes and returns plain arrays.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2. h does not depend on the stabilizer m,
which only rescales c and n, so only a loss on the returned c, n and m needs a gradient through m.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.slstm.options import MASKED, RESET, Inputs, Kernels, Options, State

SAVED_GATES_BYTES = 1 << 29
"""Gates up to this size in bytes are saved for the backward pass. Larger ones are recomputed, which
takes one product over all steps, a small part of the backward pass."""


def slstm(
    kernels: Kernels,
    x: jax.Array,
    r: jax.Array,
    b: jax.Array | None,
    state: State,
    reset: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    forget_gate: str = "sigmoid",
) -> tuple[jax.Array, State]:
    """sLSTM over a sequence.

    Args:
        kernels: one of `backends`.
        x: `B T 4 H K`, pre-activations of (i, f, z, o) without the recurrent part; float32 or
            bfloat16.
        r: `H K 4 K`, recurrent weights (input, gate, output); multiplied in the dtype of x.
        b: `H 4 K`, the bias of the four gates, added in float32; None is 0.
        state: before the first step.
        reset: `B T`; where True, the state is reset to zeros before this position.
        mask: `B T`; where False, the state is unchanged, h is 0 and x is not read.
        forget_gate: "sigmoid" or "exp".

    Any B, T, H and K are padded to tiles; padding changes no result. The gradients are exact for x,
    r, b and every leaf of the state, for losses on h and on the returned state.

    Returns h `B T H K` in the dtype of x, and the state after the last step.

    Raises:
        ValueError: mismatched shapes, an unsupported dtype or forget gate, or heads too wide for
            the chip; the message gives a width that fits.
    """
    _check(x, r, state, forget_gate)
    B, T, _, H, K = x.shape
    options = Options(
        kernels=kernels,
        tile=kernels.tile(B, T, H, K, x.dtype),
        forget_gate=forget_gate,
        save_gates=B * T * 4 * H * K * 4 <= SAVED_GATES_BYTES,
        interpret=common.interpreter(),
        target=common.target(),
    )
    b = jnp.zeros((H, 4, K), jnp.float32) if b is None else b.astype(jnp.float32)
    c, n, h_initial, m = (leaf.astype(jnp.float32) for leaf in state)
    compute = _step if T == 1 and kernels.supports_step(options.tile, x, r) else _padded
    args = (x, r, b, (c, n, h_initial, m), _flags(reset, mask))
    h, state = compute(options, *args)  # pyright: ignore[reportGeneralTypeIssues]
    return (h if mask is None else jnp.where(mask[..., None, None], h, 0)), state


def _check(x, r, state: State, forget_gate: str) -> None:
    refusal = common.dtype_refusal(x.dtype)
    if refusal is not None:
        raise ValueError(f"slstm: `x` is {x.dtype}; {refusal}.")
    if forget_gate not in ("sigmoid", "exp"):
        raise ValueError(f"slstm: `forget_gate` must be 'sigmoid' or 'exp', got {forget_gate!r}.")
    B, gates, H, K = x.shape[0], *x.shape[2:]
    shapes = {"r": (r, (H, K, 4, K))}
    shapes |= {f"state.{name}": (leaf, (B, H, K)) for name, leaf in zip("cnhm", state, strict=True)}
    for name, (array, shape) in shapes.items():
        if array.shape != shape:
            raise ValueError(
                f"slstm: `{name}` must have the shape {shape} with an `x` of B={B}, H={H} and "
                f"K={K}, got {array.shape}."
            )
    if gates != 4:
        raise ValueError(f"slstm: `x` must have 4 gates (i, f, z, o) in axis 2, got {gates}.")


def _flags(reset: jax.Array | None, mask: jax.Array | None) -> jax.Array | None:
    """`B T` with the flag bits of each step; None without resets and mask."""
    flags = None if reset is None else jnp.where(reset, RESET, 0)
    return flags if mask is None else jnp.where(mask, 0 if flags is None else flags, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(options: Options, x, r, b, state: State, flags) -> tuple[jax.Array, State]:
    """T = 1 by the decoding kernel; the backward pass is that of `_padded`."""
    h, state = options.kernels.step(options, x[:, 0], r, b, state, flags)
    return h[:, None], state


def _step_forward(options: Options, x, r, b, state, flags):
    return jax.vjp(functools.partial(_padded, options, flags=flags), x, r, b, state)


_step.defvjp(_step_forward, lambda options, pullback, cotangents: (*pullback(cotangents), None))


def _padded(options: Options, x, r, b, state: State, flags) -> tuple[jax.Array, State]:
    """`_core` for any sizes: pads the inputs, unpads the results."""
    args = options.kernels.pad(options, x, r, b, state, flags)
    h, final = _core(options, args)  # pyright: ignore[reportGeneralTypeIssues]
    return options.kernels.unpad(h, final, x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(options: Options, args: Inputs) -> tuple[jax.Array, jax.Array]:
    """h and the final state, in the layout of the kernels."""
    results = options.kernels.forward(options, args, save=False)
    return results.h, results.final


def _forward(options: Options, args: Inputs):
    kernel = common.first_order(functools.partial(options.kernels.forward, options, save=True))
    results = kernel(args)
    if results.gates is not None:  # saved gates replace x, whose dtype is that of dh
        args = args._replace(x=None)  # pyright: ignore[reportArgumentType]
    return (results.h, results.final), (args, results._replace(h=None))


def _backward(options: Options, residuals, cotangents):
    (x, r, b, initial, flags), (_, final, h_saved, cnm, gates) = residuals
    dh, dfinal = cotangents
    kernels, layout = options.kernels, options.kernels.layout
    h_before = kernels.h_before(h_saved, flags)
    weights = r.astype(dh.dtype)
    if gates is None:
        gates = x.astype(jnp.float32) + jnp.expand_dims(b, layout.time_and_batch)
        gates = gates + _product(options, layout.recurrent, h_before, weights)
    # Change of variables: rho is the cotangent of m at a fixed unscaled state (c e^m, n e^m).
    rho = dfinal[3] - dfinal[0] * final[0] - dfinal[1] * final[1]
    dfinal = jnp.stack([dfinal[0], dfinal[1], dfinal[2], rho])
    kernel = common.first_order(functools.partial(kernels.backward, options))
    dx, (dc, dn, dh_initial, rho) = kernel(gates, weights, cnm, dh, dfinal, flags)
    dr = _product(options, layout.weights, h_before, dx).astype(r.dtype)
    db = jnp.sum(dx, axis=layout.time_and_batch, dtype=jnp.float32)
    # A zero gradient, as before a reset, must stay zero even where c or n is NaN.
    dm = rho + jnp.where(dc == 0, 0.0, dc * initial[0]) + jnp.where(dn == 0, 0.0, dn * initial[1])
    return (Inputs(dx, dr, db, jnp.stack([dc, dn, dh_initial, dm]), None),)


_core.defvjp(_forward, _backward)


def _product(options: Options, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum` over all steps at once, accumulated in float32; float32 operands are not rounded."""
    if options.interpret:  # a CPU lacks some bfloat16 products with a float32 result
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)
