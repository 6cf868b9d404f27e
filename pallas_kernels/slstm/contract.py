"""What the sLSTM's kernels have in common on every chip: the memory, the bits of a step, checks."""

import jax
import jax.numpy as jnp

from pallas_kernels import common

State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""c, n, h, m: each `B H K` in float32; n = 0 where nothing is stored."""

RESET, MASKED = 1, 2
"""Bits of a step: the memory before it is emptied; it is passed over."""

SAVED_GATES_BYTES = 1 << 29
"""Gates of a call are kept for its gradient up to this size; computing them again is one product
over all steps at once, a small part of the gradient, so larger calls had better save the memory."""


def first_m_gradient(rho: jax.Array, dc: jax.Array, dn: jax.Array, c: jax.Array, n: jax.Array):
    """The gradient of the first m: rho, and what m moves as the scale of c and n.

    Where no gradient reaches c or n, as before a reset, what they hold does not count, be it NaN.
    """
    moved = jnp.where(dc == 0, 0.0, dc * c) + jnp.where(dn == 0, 0.0, dn * n)
    return rho + moved


def check_arguments(function: str, x, r, state: State, forget_gate: str) -> None:
    """What the kernels can compute with; x as `B T 4 H K`.

    Raises:
        ValueError: see `slstm`.
    """
    refusal = common.refused_dtype(x.dtype)
    if refusal is not None:
        raise ValueError(f"{function}: `x` is {x.dtype}; {refusal}.")
    if forget_gate not in ("sigmoid", "exp"):
        raise ValueError(
            f"{function}: `forget_gate` must be 'sigmoid' or 'exp', got {forget_gate!r}."
        )
    B, gates, H, K = x.shape[0], *x.shape[2:]
    shapes = {"r": (r, (H, K, 4, K))}
    shapes |= {f"state.{name}": (leaf, (B, H, K)) for name, leaf in zip("cnhm", state, strict=True)}
    for name, (array, shape) in shapes.items():
        if array.shape != shape:
            raise ValueError(
                f"{function}: `{name}` must have the shape {shape} with an `x` of B={B}, H={H} and "
                f"K={K}, got {array.shape}."
            )
    if gates != 4:
        raise ValueError(f"{function}: `x` must hold 4 gates (i, f, z, o), got {gates}.")
