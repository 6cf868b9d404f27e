"""The sLSTM on a GPU with its exact gradient: arrays in, arrays out.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.2. m is a gauge of (c, n): h does not depend
on it, so only a loss on the returned c, n and m needs a gradient through it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import common
from pallas_kernels.slstm import triton_calls, triton_tiles
from pallas_kernels.slstm.contract import (
    MASKED,
    RESET,
    SAVED_GATES_BYTES,
    State,
    check_arguments,
    first_m_gradient,
)
from pallas_kernels.slstm.triton_calls import Options
from pallas_kernels.slstm.triton_decode import decode


def slstm(
    x: jax.Array,
    r: jax.Array,
    b: jax.Array | None,
    state: State,
    reset: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    forget_gate: str = "sigmoid",
    save_gates: bool | None = None,
) -> tuple[jax.Array, State]:
    """sLSTM over a sequence, computed by Triton kernels; arguments and results as of `vjp.slstm`.

    Any B, T, H and K: rows that are not there are masked, widths are filled up, which changes no
    result.

    Raises:
        ValueError: shapes that do not fit, a dtype or a forget gate that is not known.
    """
    check_arguments("slstm", x, r, state, forget_gate)
    B, T, _, H, K = x.shape
    if save_gates is None:
        save_gates = B * T * 4 * H * K * 4 <= SAVED_GATES_BYTES
    options = Options(forget_gate, save_gates, bool(common.interpreter()), common.target())
    b = jnp.zeros((H, 4, K), jnp.float32) if b is None else b.astype(jnp.float32)
    width = triton_tiles.width(K, common.lanes())
    x = common.fill(x, 4, width)
    r = common.fill(common.fill(r, 3, width), 1, width)
    b = common.fill(b, 2, width)
    first = jax.tree.map(lambda leaf: common.fill(leaf.astype(jnp.float32), 2, width), state)
    flags = _flags(B, T, reset, mask)
    compute = _step if T == 1 else _scan
    h, leaves = compute(options, x, r, b, first, flags)  # pyright: ignore[reportGeneralTypeIssues]
    c, n, h_last, m = (leaf[..., :K] for leaf in leaves)
    h = h[..., :K]
    return (h if mask is None else jnp.where(mask[..., None, None], h, 0)), (c, n, h_last, m)


def _flags(B: int, T: int, reset, mask) -> jax.Array | None:
    """`B T` with the bits of a step; None where no step has any."""
    if reset is None and mask is None:
        return None
    flags = jnp.zeros((B, T), jnp.int32)
    if reset is not None:
        flags = jnp.where(reset, RESET, flags)
    return flags if mask is None else jnp.where(mask, flags, MASKED)


def _scan(options: Options, x, r, b, state: State, flags):
    """A sequence, its states as one array."""
    h, last = _core(options, x, r, b, jnp.stack(state), flags)  # pyright: ignore[reportGeneralTypeIssues]
    return h, (last[0], last[1], last[2], last[3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(options: Options, x, r, b, state: State, flags) -> tuple[jax.Array, State]:
    """T = 1: the kernel for one step; its gradient is that of a sequence."""
    state = decode(options, x[:, 0], r, b, state, flags)
    return state[2].astype(x.dtype)[:, None], state


def _step_forward(options: Options, x, r, b, state, flags):
    compute = lambda x, r, b, state: _scan(options, x, r, b, state, flags)  # noqa: E731
    return jax.vjp(compute, x, r, b, state)


def _step_backward(options: Options, pull, cotangents):
    del options
    return *pull(cotangents), None


_step.defvjp(_step_forward, _step_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(options: Options, x, r, b, first, flags) -> tuple[jax.Array, jax.Array]:
    """x `B T 4 H K`, r `H K 4 K`, b `H 4 K`, first `4 B H K`; h `B T H K` and the last state."""
    h, last = triton_calls.forward(options, save=False)(x, r.astype(x.dtype), b, first, flags)
    return h[:, 1:], last


def _forward(options: Options, x, r, b, first, flags):
    found = triton_calls.forward(options, save=True)(x, r.astype(x.dtype), b, first, flags)
    h = checkpoint_name(found[0], "slstm_h")
    last, seen = (checkpoint_name(a, "slstm_states") for a in found[1:3])
    gates = checkpoint_name(found[3], "slstm_gates") if options.save_gates else None
    # With the gates kept nothing of x is needed: its dtype is that of h.
    kept_x = None if options.save_gates else x
    return (h[:, 1:], last), (kept_x, r, b, first, last, flags, h, seen, gates)


def _backward(options: Options, residuals, cotangents):
    x, r, b, first, last, flags, h, seen, gates = residuals
    dh, dlast = cotangents
    before = h[:, :-1]
    if flags is not None:
        before = jnp.where((flags & RESET != 0)[..., None, None], 0, before)
    weights = r.astype(h.dtype)
    if gates is None:
        recurrent = _product(options, "BTHK,HKGJ->BTGHJ", before, weights)
        gates = x.astype(jnp.float32) + jnp.swapaxes(b, 0, 1)[None, None] + recurrent
    # A loss on the stored m that is one on the memory moves c and n with it; rho is what remains.
    rho = dlast[3] - dlast[0] * last[0] - dlast[1] * last[1]
    dlast = jnp.stack([dlast[0], dlast[1], dlast[2], rho])
    dx, dfirst = triton_calls.backward(options)(gates, weights, seen, dh, dlast, flags)
    dr = _product(options, "BTHK,BTGHJ->HKGJ", before, dx).astype(r.dtype)
    db = jnp.swapaxes(jnp.sum(dx, axis=(0, 1), dtype=jnp.float32), 0, 1)
    dc, dn, dh_first, rho = dfirst
    dm = first_m_gradient(rho, dc, dn, first[0], first[1])
    return dx, dr, db, jnp.stack([dc, dn, dh_first, dm]), None


_core.defvjp(_forward, _backward)


def _product(options: Options, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """All steps at once, in float32; float32 operands keep all their digits."""
    if options.interpret:  # not every product of bfloat16 with a float32 result exists on a CPU
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)
