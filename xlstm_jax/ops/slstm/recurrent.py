"""sLSTM as a scan over time with a hand-written gradient.

The forward loop contains one product with the recurrent weights and the ops that depend on it; the
backward loop contains the transposed product and six multiplications. Everything else is computed
for all steps at once, before or after a loop; the gradient of the weights is one product.

Source: arXiv:2405.04517, section 2.2. The stabilizer m is a gauge of (c, n): h does not depend on
it, so a loss on h needs no gradient through m; one on the returned c, n, m does (`_scale_grads`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import NEG, exact_einsum, log_sigmoid
from xlstm_jax.cells.slstm import SLSTMState
from xlstm_jax.ops import gated
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.gradient import with_backward
from xlstm_jax.typing import Array, Float


def slstm_recurrent(
    inputs: gated.Inputs, forget_gate: str
) -> tuple[Float[Array, "B T H K"], SLSTMState]:
    """The op `slstm`; `reset` and `mask` as in `cells.slstm_scan`."""
    x, r, b, state, (reset, mask) = inputs
    dtype = state.c.dtype
    x = inputs.flags.zero_masked(x).astype(dtype)
    if mask is not None and reset is not None:
        reset = reset & mask
    if b is not None:
        # For all steps at once, outside the loop.
        x = x + jnp.swapaxes(b, 0, 1)[None, None].astype(dtype)
    # Heads before batch inside the loop: the batched product over heads then needs no transpose.
    x = jnp.transpose(x, (1, 3, 0, 2, 4))
    state = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), state)
    # `T 1 B 1`, to broadcast against `T H B K`.
    flags = Flags(*(None if f is None else f.T[:, None, :, None] for f in (reset, mask)))
    r = r.astype(dtype)  # once, not in every step
    h, state = _scan(forget_gate, x, r, state, flags)
    h = jnp.transpose(h, (2, 0, 1, 3)).astype(inputs.x.dtype)
    return h, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), state)


def _forward(
    forget_gate: str,
    x: Float[Array, "T H B 4 K"],
    r: Float[Array, "H K 4 K"],
    state: SLSTMState,
    flags: Flags,
):
    def step(state, xs):
        x, flags = xs
        before = state
        if flags.reset is not None:
            before = jax.tree.map(lambda s: jnp.where(flags.reset, 0, s), state)
        gates = x + exact_einsum("HBK,HKGJ->HBGJ", before.h, r)
        i, f, z, o = (gates[:, :, g] for g in range(4))
        # As in `cells.slstm_step`: exponents are <= 0 and n is 0 or >= 1.
        log_carry = jnp.where(before.n == 0, -jnp.inf, _log_forget(forget_gate, f) + before.m)
        m = jnp.maximum(jnp.maximum(log_carry, i), NEG)
        f_scaled, i_scaled = jnp.exp(log_carry - m), jnp.exp(i - m)
        c = f_scaled * before.c + i_scaled * jnp.tanh(z)
        n = f_scaled * before.n + i_scaled
        h = jax.nn.sigmoid(o) * c / jnp.where(n == 0, 1, n)
        after = SLSTMState(c, n, h, m)
        if flags.mask is not None:
            after = jax.tree.map(lambda a, b: jnp.where(flags.mask, a, b), after, state)
            h = jnp.where(flags.mask, h, 0)
        return after, (h, gates, after)

    last, (h, gates, states) = jax.lax.scan(step, state, (x, flags))
    return (h, last), (r, state, flags, gates, states)


class _Factors(NamedTuple):
    """Partial derivatives that the backward loop multiplies with; each `T H B K`.

    `c_to_f` is the derivative of c after the step by the pre-activation f, and so on.
    """

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
    # Derivative of log f by its pre-activation.
    slope = jnp.ones_like(f) if forget_gate == "exp" else jax.nn.sigmoid(-f)
    log_carry = jnp.where(before.n == 0, -jnp.inf, _log_forget(forget_gate, f) + before.m)
    f_scaled, i_scaled = jnp.exp(log_carry - after.m), jnp.exp(i - after.m)
    z, o = jnp.tanh(z), jax.nn.sigmoid(o)
    inverse = 1 / jnp.where(after.n == 0, 1, after.n)
    return _Factors(
        h_to_c=o * inverse,
        h_to_n=-after.h * inverse,
        h_to_o=after.h * (1 - o),
        c_to_i=i_scaled * z,
        n_to_i=i_scaled,
        c_to_f=f_scaled * before.c * slope,
        n_to_f=f_scaled * before.n * slope,
        c_to_z=i_scaled * (1 - jnp.square(z)),
        f_scaled=f_scaled,
    )


def _backward(forget_gate, residuals, cotangents):
    r, initial, flags, gates, states = residuals
    dh, dlast = cotangents
    before = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b[:-1]]), initial, states)
    if flags.reset is not None:
        before = jax.tree.map(lambda s: jnp.where(flags.reset, 0, s), before)
    after = states
    if flags.mask is not None:
        # A masked step does not change the state: the loop does not use its factors, so any finite
        # values will do.
        gates = jnp.where(flags.mask[..., None], gates, 0)
        before = jax.tree.map(lambda s: jnp.where(flags.mask, s, 0), before)
        after = jax.tree.map(lambda s: jnp.where(flags.mask, s, 1), states)
        dh = jnp.where(flags.mask, dh, 0)

    def step(carry, xs):
        dc, dn, dh_next = carry
        dh, w, (gauge_i, gauge_f), flags = xs
        dh = dh + dh_next
        dc, dn = dc + dh * w.h_to_c, dn + dh * w.h_to_n
        di = dc * w.c_to_i + dn * w.n_to_i + gauge_i
        df = dc * w.c_to_f + dn * w.n_to_f + gauge_f
        dgates = jnp.stack([di, df, dc * w.c_to_z, dh * w.h_to_o], axis=2)
        dbefore = (dc * w.f_scaled, dn * w.f_scaled, exact_einsum("HBGJ,HKGJ->HBK", dgates, r))
        if flags.reset is not None:
            # After a reset f_scaled is 0 (n = 0 before), so only dh must be cleared.
            dbefore = (dbefore[0], dbefore[1], jnp.where(flags.reset, 0, dbefore[2]))
        if flags.mask is not None:
            pairs = zip(dbefore, carry, strict=True)
            dbefore = tuple(jnp.where(flags.mask, a, b) for a, b in pairs)
            dgates = jnp.where(flags.mask[..., None], dgates, 0)
        return dbefore, dgates

    factors = _factors(forget_gate, gates, before, after)
    # The gradient of the loss on the last state through m: c and n have the factor exp(-m).
    rho = dlast.m - dlast.c * states.c[-1] - dlast.n * states.n[-1]
    gauge, rho = _scale_grads(forget_gate, gates, before, flags, rho)
    carry = (dlast.c, dlast.n, dlast.h)
    (dc, dn, dh), dgates = jax.lax.scan(step, carry, (dh, factors, gauge, flags), reverse=True)
    dr = exact_einsum("THBK,THBGJ->HKGJ", before.h, dgates)
    # For the initial state the same in reverse: exp(m) scales its c and n.
    dinitial = SLSTMState(dc, dn, dh, rho + dc * initial.c + dn * initial.n)
    return dgates, dr, dinitial, Flags(None, None)


_scan = with_backward(_forward, _backward, num_static=1, rematerialize=True)


def _scale_grads(forget_gate, gates, before: SLSTMState, flags: Flags, rho):
    """Gradient through m_t = max(log f_t + m_{t-1}, i_t) of a loss on the last m.

    It follows the path of the maximum backward, from the last step to the one whose m came from i.

    Returns the cotangents of i and of f, and of m before the first step.
    """
    i, f = gates[..., 0, :], gates[..., 1, :]
    is_f = (before.n != 0) & (_log_forget(forget_gate, f) + before.m >= i)
    mask = True if flags.mask is None else flags.mask
    # A segment starts where m comes from i; only the last one reaches the last m.
    segment = jnp.cumsum(~is_f & mask, axis=0)
    on_path = (segment == segment[-1:]) & mask
    slope = jnp.ones_like(f) if forget_gate == "exp" else jax.nn.sigmoid(-f)
    di = jnp.where(on_path & ~is_f, rho[None], 0)
    df = jnp.where(on_path & is_f, rho[None] * slope, 0)
    return (di, df), jnp.where(segment[-1] == 0, rho, 0)


def _log_forget(forget_gate: str, f: Array) -> Array:
    return f if forget_gate == "exp" else log_sigmoid(f)
