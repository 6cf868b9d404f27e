"""sLSTM as a scan over time whose gradient is written by hand.

The loop forward holds one product with the recurrent weights and what depends on it; the loop
backward holds the transposed product and six multiplications. Everything that can be known before
or after a loop is computed for all steps at once, the weights' gradient as one product.

Source: arXiv:2405.04517, section 2.2. The stabilizer m is a gauge of (c, n): h does not depend on
it, so a loss on h needs no gradient through m; one on the returned c, n, m does (`_scale_grads`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import NEG, exact_einsum, log_sigmoid
from xlstm_jax.cells.slstm import SLSTMState
from xlstm_jax.ops import gated
from xlstm_jax.ops.flags import Flags
from xlstm_jax.typing import Array, Float


def slstm_recurrent(
    inputs: gated.Inputs, forget_gate: str
) -> tuple[Float[Array, "B T H K"], SLSTMState]:
    """The op `slstm`."""
    x, r, b, state, (reset, mask) = inputs
    dtype = state.c.dtype
    x = inputs.flags.zero_masked(x).astype(dtype)
    if mask is not None and reset is not None:
        reset = reset & mask
    if b is not None:
        x = x + jnp.swapaxes(b, 0, 1)[None, None].astype(dtype)
    # Heads first inside the loop: its product then needs no transposition.
    x = jnp.transpose(x, (1, 3, 0, 2, 4))
    state = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), state)
    # `T 1 B 1`, to broadcast against heads and cells.
    flags = Flags(*(None if f is None else f.T[:, None, :, None] for f in (reset, mask)))
    r = r.astype(dtype)
    h, state = _scan(forget_gate, x, r, state, flags)  # pyright: ignore[reportGeneralTypeIssues]
    h = jnp.transpose(h, (2, 0, 1, 3)).astype(inputs.x.dtype)
    return h, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    forget_gate: str,
    x: Float[Array, "T H B 4 K"],
    r: Float[Array, "H K 4 K"],
    state: SLSTMState,
    flags: Flags,
) -> tuple[Float[Array, "T H B K"], SLSTMState]:
    return _forward(forget_gate, x, r, state, flags)[0]


def _forward(forget_gate, x, r, state, flags: Flags):
    def step(state, now):
        x, flags = now
        seen = state
        if flags.reset is not None:
            seen = jax.tree.map(lambda s: jnp.where(flags.reset, 0, s), state)
        gates = x + exact_einsum("HBK,HKGJ->HBGJ", seen.h, r)
        i, f, z, o = (gates[:, :, g] for g in range(4))
        log_carry = jnp.where(seen.n == 0, NEG, _log_forget(forget_gate, f) + seen.m)
        m = jnp.maximum(log_carry, i)
        f_scaled, i_scaled = jnp.exp(log_carry - m), jnp.exp(i - m)
        c = f_scaled * seen.c + i_scaled * jnp.tanh(z)
        n = f_scaled * seen.n + i_scaled
        h = jax.nn.sigmoid(o) * c / n
        new = SLSTMState(c, n, h, m)
        if flags.mask is not None:
            new = jax.tree.map(lambda a, b: jnp.where(flags.mask, a, b), new, state)
            h = jnp.where(flags.mask, h, 0)
        return new, (h, gates, new)

    last, (h, gates, states) = jax.lax.scan(step, state, (x, flags))
    return (h, last), (r, state, flags, gates, states)


class _Factors(NamedTuple):
    """What the backward loop multiplies with; each `T H B K`."""

    h_to_c: Array
    h_to_n: Array
    h_to_o: Array
    c_to_i: Array
    n_to_i: Array
    c_to_f: Array
    n_to_f: Array
    c_to_z: Array
    f_scaled: Array


def _factors(forget_gate, gates, before: SLSTMState, after: SLSTMState) -> _Factors:
    i, f, z, o = (gates[..., g, :] for g in range(4))
    slope = jnp.ones_like(f) if forget_gate == "exp" else jax.nn.sigmoid(-f)
    log_carry = jnp.where(before.n == 0, NEG, _log_forget(forget_gate, f) + before.m)
    f_scaled, i_scaled = jnp.exp(log_carry - after.m), jnp.exp(i - after.m)
    z, o = jnp.tanh(z), jax.nn.sigmoid(o)
    return _Factors(
        h_to_c=o / after.n,
        h_to_n=-after.h / after.n,
        h_to_o=after.h * (1 - o),
        c_to_i=i_scaled * z,
        n_to_i=i_scaled,
        c_to_f=f_scaled * before.c * slope,
        n_to_f=f_scaled * before.n * slope,
        c_to_z=i_scaled * (1 - jnp.square(z)),
        f_scaled=f_scaled,
    )


def _backward(forget_gate, residuals, cotangents):
    r, first, flags, gates, states = residuals
    dh, dlast = cotangents
    before = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b[:-1]]), first, states)
    if flags.reset is not None:
        before = jax.tree.map(lambda s: jnp.where(flags.reset, 0, s), before)
    after = states
    if flags.mask is not None:
        # A masked step keeps the old state; any finite stand-in does for factors nobody reads.
        gates = jnp.where(flags.mask[..., None], gates, 0)
        before = jax.tree.map(lambda s: jnp.where(flags.mask, s, 0), before)
        after = jax.tree.map(lambda s: jnp.where(flags.mask, s, 1), states)
        dh = jnp.where(flags.mask, dh, 0)

    def step(carry, now):
        dc, dn, dh_next = carry
        dh, w, (gauge_i, gauge_f), flags = now
        dh = dh + dh_next
        dc_now, dn_now = dc + dh * w.h_to_c, dn + dh * w.h_to_n
        di = dc_now * w.c_to_i + dn_now * w.n_to_i + gauge_i
        df = dc_now * w.c_to_f + dn_now * w.n_to_f + gauge_f
        dgates = jnp.stack([di, df, dc_now * w.c_to_z, dh * w.h_to_o], axis=2)
        new = (dc_now * w.f_scaled, dn_now * w.f_scaled, exact_einsum("HBGJ,HKGJ->HBK", dgates, r))
        if flags.reset is not None:
            new = (new[0], new[1], jnp.where(flags.reset, 0, new[2]))
        if flags.mask is not None:
            new = tuple(jnp.where(flags.mask, a, b) for a, b in zip(new, carry, strict=True))
            dgates = jnp.where(flags.mask[..., None], dgates, 0)
        return new, dgates

    factors = _factors(forget_gate, gates, before, after)
    rho = dlast.m - dlast.c * states.c[-1] - dlast.n * states.n[-1]
    gauge, rho = _scale_grads(forget_gate, gates, before, flags, rho)
    carry = (dlast.c, dlast.n, dlast.h)
    (dc, dn, dh0), dgates = jax.lax.scan(step, carry, (dh, factors, gauge, flags), reverse=True)
    dr = exact_einsum("THBK,THBGJ->HKGJ", before.h, dgates)
    dstate = SLSTMState(dc, dn, dh0, rho + dc * first.c + dn * first.n)
    return dgates, dr, dstate, Flags(None, None)


_scan.defvjp(_forward, _backward)


def _scale_grads(forget_gate, gates, before: SLSTMState, flags: Flags, rho):
    """Gradient through m_t = max(log f_t + m_{t-1}, i_t) of a loss placed on the last m.

    It follows the path of the maximum back from the last step until an input gate made m.

    Returns the cotangents of i and of f, and of m before the first step.
    """
    i, f = gates[..., 0, :], gates[..., 1, :]
    by_f = (before.n != 0) & (_log_forget(forget_gate, f) + before.m >= i)
    mask = True if flags.mask is None else flags.mask
    segment = jnp.cumsum(~by_f & mask, axis=0)
    on_path = (segment == segment[-1:]) & mask
    slope = jnp.ones_like(f) if forget_gate == "exp" else jax.nn.sigmoid(-f)
    di = jnp.where(on_path & ~by_f, rho[None], 0)
    df = jnp.where(on_path & by_f, rho[None] * slope, 0)
    return (di, df), jnp.where(segment[-1] == 0, rho, 0)


def _log_forget(forget_gate: str, f: Array) -> Array:
    return f if forget_gate == "exp" else log_sigmoid(f)
