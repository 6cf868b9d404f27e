"""The WKV operator of RWKV-4 over a sequence.

Source: Peng et al. 2023, arXiv:2305.13048, section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import NEG
from xlstm_jax.cells.wkv import WKVState, wkv_init, wkv_scan
from xlstm_jax.ops import dispatch, over_time
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.typing import Array, Flag, Float


class Inputs(NamedTuple):
    """Arguments of the op besides state and flags."""

    k: Float[Array, "B T F"]
    v: Float[Array, "B T F"]
    log_decay: Float[Array, "F"]
    bonus: Float[Array, "F"]


SIGNATURE = over_time.Signature(
    "wkv",
    Inputs._make(("B T F", "B T F", "F", "F")),
    WKVState._make(("B F", "B F", "B F")),
    "B T F",
)


def _recurrent(inputs: Inputs, state: WKVState, flags: Flags):
    return wkv_scan(*inputs, state, **flags._asdict())


class _Steps(NamedTuple):
    """The map from a state to a later one: weights times exp(decay), plus a sum (c, n, m)."""

    decay: Float[Array, "B T F"]
    c: Float[Array, "B T F"]
    n: Float[Array, "B T F"]
    m: Float[Array, "B T F"]


def _compose(first: _Steps, second: _Steps) -> _Steps:
    carried = first.m + second.decay
    m = jnp.maximum(carried, second.m)
    old, new = jnp.exp(carried - m), jnp.exp(second.m - m)
    return _Steps(
        first.decay + second.decay,
        old * first.c + new * second.c,
        old * first.n + new * second.n,
        m,
    )


def _parallel(inputs: Inputs, state: WKVState, flags: Flags):
    """All states by an associative scan over time, whose depth is the logarithm of T."""
    wide = state.c.dtype
    k, v = (flags.zero_masked(a).astype(wide) for a in (inputs.k, inputs.v))
    log_decay, bonus = (a.astype(wide)[None, None] for a in (inputs.log_decay, inputs.bonus))
    decay, n = jnp.broadcast_to(log_decay, k.shape), jnp.ones_like(k)
    m = k
    if flags.mask is not None:
        is_valid = flags.mask[..., None]
        decay, n = jnp.where(is_valid, decay, 0), jnp.where(is_valid, n, 0)
        m = jnp.where(is_valid, k, NEG)
    if (reset := flags.valid_reset) is not None:
        decay = jnp.where(reset[..., None], NEG, decay)  # exp(NEG) is 0
    first = _Steps(jnp.zeros_like(state.c), state.c, state.n, jnp.where(state.n == 0, NEG, state.m))
    steps = _Steps(decay, n * v, n, m)
    steps = jax.tree.map(lambda a, b: jnp.concatenate([a[:, None], b], axis=1), first, steps)
    after = jax.lax.associative_scan(_compose, steps, axis=1)
    before = jax.tree.map(lambda a: a[:, :-1], after)
    if reset is not None:  # a document begins without older values
        old_m = jnp.where(reset[..., None], NEG, before.m)
        before = before._replace(m=old_m)
    top = jnp.maximum(before.m, k + bonus)
    old, new = jnp.exp(before.m - top), jnp.exp(k + bonus - top)
    h = (old * before.c + new * v) / (old * before.n + new)
    last = WKVState(after.c[:, -1], after.n[:, -1], after.m[:, -1])
    return flags.zero_masked(h).astype(inputs.v.dtype), last


def _not_on_cpu(call: dispatch.Call) -> str | None:
    if call.platform == "cpu" and not call.named:
        return "a CPU is faster at the scan over time"
    return dispatch.symbolic_refusal(call, "T")


# Ordered by preference: "auto" selects the first that supports the call.
IMPLEMENTATIONS = {
    "parallel": Implementation(_parallel, _not_on_cpu),
    "recurrent": Implementation(_recurrent),
}


@on_any_mesh((SIGNATURE.y, SIGNATURE.state))
def wkv(
    k: Float[Array, "B T F"],
    v: Float[Array, "B T F"],
    log_decay: Float[Array, "F"],
    bonus: Float[Array, "F"],
    state: WKVState | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T F"], WKVState]:
    """Mean of the values of a channel, weighted by exp(k) and the distance (arXiv:2305.13048).

    Args:
        k: log weights.
        v: values.
        log_decay: log of the factor of all older weights at each step, at most 0.
        bonus: added to the log weight of the newest value while it is the newest.
        state: before the first step; None is the initial state, zeros in every leaf.
        reset: where True, the state before this position is replaced by the initial one.
        mask: where False, the state stays bit-identical, h is 0 and resets are ignored.
        implementation: a name of `ops.implementations("wkv")`, or "auto".

    Returns h in the dtype of v, and the state after the last step, float32 or wider.

    Raises:
        ValueError: inconsistent shapes, or an unknown implementation.
        NotImplementedError: the implementation does not support this call; gives the reason.
    """
    if implementation == "auto" and k.ndim > 1 and k.shape[1] == 1:
        implementation = "recurrent"
    inputs, flags = Inputs(k, v, log_decay, bonus), Flags.of(reset, mask)
    return over_time.run(
        SIGNATURE, IMPLEMENTATIONS, implementation, inputs, state, flags, init=_init
    )


def _init(inputs: Inputs, dtype: jnp.dtype) -> WKVState:
    return wkv_init(inputs.k.shape[0], inputs.k.shape[-1], dtype)
