"""Summaries of parts of a sequence: what a shard or a segment does to the state of the mLSTM.

A part of the sequence acts on the state as an affine map, state -> e^g state + e^m C. The summary
(g, m, C, n) describes it completely, whatever the length. Composition of affine maps is
associative, so the state before any part follows from the summaries of all earlier ones.

Source: the recurrence of arXiv:2405.04517, section 2.3, written for parts instead of steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mlstm import gates as pre
from pallas_kernels.mlstm.gates import NEG, LogGates
from xlstm_jax.cells.logspace import exact_einsum
from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.ops.cpu import materialize
from xlstm_jax.ops.gradient import times_unit
from xlstm_jax.ops.mlstm.arguments import Options
from xlstm_jax.ops.mlstm.products import product
from xlstm_jax.typing import Array, ArrayLike, Float, Int

GATE_CHUNK = 256
"""Positions per chunk in the two-level sum of log gates: within chunks, then over chunks."""


class Summary(NamedTuple):
    """The affine map of a part of the sequence on the state; C and n are divided by e^m."""

    g: Float[Array, "*parts B H"]  # sum of log f; NEG if the part contains a reset
    m: Float[Array, "*parts B H"]  # log-scale; NEG if the part writes nothing
    C: Float[Array, "*parts B H K V"]
    n: Float[Array, "*parts B H K"]


def summarize(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gates: LogGates,
    options: Options,
    m_first: Float[Array, "B H"] | None = None,
) -> Summary:
    """The summary of a part of the sequence: one matrix product over all its positions.

    With `m_first`, m before the part, the result is relative: g is the log weight of the state
    before the part in the state after it, both divided by e^m. All m are constants to autodiff
    then; `relative` and `absolute` carry their gradient.
    """
    dtype = gates.log_i.dtype
    weights, g, m = weights_at_end(gates, options, m_first)
    # A product over `B T H` needs transposes. XLA's own, for a GPU, would be of float32 keys.
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    keys = jnp.exp(weights)[..., None] * k
    C = product("BHTK,BHTV->BHKV", v.dtype, keys, v.astype(dtype))
    return Summary(g, m, C, jnp.sum(keys, axis=2, dtype=dtype))


def weights_at_end(
    gates: LogGates, options: Options, m_first: Float[Array, "B H"] | None = None
) -> tuple[Float[Array, "B H T"], Float[Array, "B H"], Float[Array, "B H"]]:
    """Log weight of every position in the state at the part's end; the part's g and m.

    Relative to m the log weights are sums of negative numbers over later steps: within a chunk,
    then over chunks. `m_first` is as in `summarize`.
    """
    B, T, H = gates.log_i.shape
    chunks = pre.in_chunks(gates, min(GATE_CHUNK, T))
    first = jnp.full((B, H), NEG, gates.log_i.dtype) if m_first is None else m_first
    m = materialize(pre.stabilizers(chunks, first, max_state=options.max_state))
    m = m if m_first is None else jax.lax.stop_gradient(m)
    decays = pre.decays(chunks, *m, forget_gate=options.forget_gate)
    later = jax.lax.cumsum(decays.across, axis=2, reverse=True)
    later = jnp.pad(later[..., 1:], ((0, 0), (0, 0), (0, 1)))
    # NEG is the lowest log weight, also where a sum has more than one of them.
    to_end = jnp.maximum(decays.to_end + later[..., None], NEG)
    weights = to_end.reshape(B, H, -1)[..., :T]
    if m_first is not None:
        return weights, jnp.sum(decays.across, axis=-1), decays.m_end[..., -1]
    log_f = gates.log_f
    if gates.reset is not None:
        log_f = jnp.where(gates.reset[..., None], -jnp.inf, log_f)
    return weights, jnp.sum(log_f, axis=1), decays.m_end[..., -1]


def boundary_stabilizers(
    m_parts: Float[Array, "parts B H"], g: Float[Array, "parts B H"], m: Float[Array, "B H"]
) -> Float[Array, "parts+1 B H"]:
    """m of the recurrence before every part, and after the last one.

    Args:
        m_parts, g: of summaries that are not relative.
        m: before the first part.
    """
    # `B H 1 parts`: each part is treated as a step.
    m_parts, g = (jnp.moveaxis(a, 0, -1)[:, :, None] for a in (m_parts, g))
    after = pre.stabilizers(LogGates(m_parts, g, None), m, max_state=True)[0][:, :, 0]
    return jnp.concatenate([m[None], jnp.moveaxis(after, -1, 0)])


def relative(state: MLSTMState) -> MLSTMState:
    """A state with m = 0 for C and n of `state`, whose factor e^m only has a gradient.

    Near ties of a maximum, two computations of m can have different gradients. So the factor e^m
    and the m of a state are always the same array, and cancel in every gradient of h.
    """
    C, n = times_unit(state.C, state.m), times_unit(state.n, state.m)
    return MLSTMState(C, n, jnp.zeros_like(state.m))


def absolute(state: MLSTMState, m: Float[Array, "*parts B H"]) -> MLSTMState:
    """The inverse of `relative`, for states with this m."""
    # `state.m` is 0, but it is a maximum too, and has a gradient where g is 0.
    factor = state.m - m
    return MLSTMState(times_unit(state.C, factor), times_unit(state.n, factor), m)


def combine(x: Summary, y: Summary) -> Summary:
    """The summary of part x followed by part y."""
    log_carry = jnp.maximum(y.g + x.m, NEG)
    m = jnp.maximum(log_carry, y.m)
    f_scaled, i_scaled = jnp.exp(log_carry - m), jnp.exp(y.m - m)
    C = f_scaled[..., None, None] * x.C + i_scaled[..., None, None] * y.C
    n = f_scaled[..., None] * x.n + i_scaled[..., None] * y.n
    return Summary(x.g + y.g, m, C, n)


def apply_summary(state: MLSTMState, part: Summary) -> MLSTMState:
    """The state after a part that starts from `state`."""
    # The state as a summary: its g does not enter m, C and n of the result.
    _, m, C, n = combine(Summary(jnp.zeros_like(state.m), state.m, state.C, state.n), part)
    return MLSTMState(C, n, m)


def state_before(rank: Int[ArrayLike, ""], parts: Summary, state: MLSTMState) -> MLSTMState:
    """The state after parts 0 .. rank - 1 that start from `state`.

    Each summary is weighted by the decay from its part to part `rank`.
    """
    ranks = jnp.arange(len(parts.g))
    is_before = ranks < rank
    is_between = (ranks[:, None] < ranks[None]) & is_before[None]
    decay = jnp.sum(jnp.where(is_between[..., None, None], parts.g[None], 0.0), axis=1)
    log_weights = jnp.where(is_before[:, None, None], jnp.maximum(decay + parts.m, NEG), NEG)
    log_carry = jnp.sum(jnp.where(is_before[:, None, None], parts.g, 0.0), axis=0)
    log_carry = jnp.maximum(log_carry + state.m, NEG)
    m = jnp.maximum(jnp.max(log_weights, axis=0), log_carry)
    weights, f_scaled = jnp.exp(log_weights - m[None]), jnp.exp(log_carry - m)
    # If m is NEG, exp(NEG - m) is 1: later parts need an explicit zero.
    weights = jnp.where(is_before[:, None, None], weights, 0.0)
    C = exact_einsum("SBH,SBHKV->BHKV", weights, parts.C, dtype=m.dtype)
    n = exact_einsum("SBH,SBHK->BHK", weights, parts.n, dtype=m.dtype)
    return MLSTMState(f_scaled[..., None, None] * state.C + C, f_scaled[..., None] * state.n + n, m)
