"""Causal convolution over time, with a state, resets and masks.

Source: arXiv:2405.04517, appendix (window 4 before the mLSTM and sLSTM gates).
"""

import jax
import jax.numpy as jnp

from xlstm_jax.ops.checks import check_length, check_shapes
from xlstm_jax.ops.cpu import materialize_cotangent
from xlstm_jax.ops.flags import FLAG_AXES, Flags
from xlstm_jax.ops.sharded.halo import nearest_state, shifted_states
from xlstm_jax.ops.sharded.shard_map import map_shards, sharding_axes
from xlstm_jax.typing import Array, Bool, Float


def causal_conv(
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"] | Float[Array, "W F F_out"],
    bias: Float[Array, "F_out"] | None = None,
    state: Float[Array, "B W-1 F"] | None = None,
    *,
    reset: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T F_out"], Float[Array, "B W-1 F"]]:
    """y[t] = bias + sum over j of kernel[j] * x[t - (W-1) + j]: kernel[W-1] meets the current step.

    Args:
        x: inputs.
        kernel: one window per channel `W F`, or mixing channels `W F_in F_out`.
        bias: added to every step.
        state: the W-1 inputs before the first step, oldest first; None means zeros.
        reset: where True, inputs before this position count as zeros from here on.
        mask: where False, the step is taken out of the sequence: y is 0 there, later windows do
            not see it, and a reset there is void.

    Returns y, and the last W-1 inputs, oldest first, as the next call's `state`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    depthwise = kernel.ndim == 2
    sizes = check_shapes(
        "causal_conv",
        {
            "x": (x, "B T F"),
            "kernel": (kernel, "W F" if depthwise else "W F F_out"),
            "bias": (bias, "F" if depthwise else "F_out"),
            "reset": (reset, "B T"),
            "mask": (mask, "B T"),
        },
    )
    check_length("causal_conv", sizes)
    B, T, F, W = (sizes[axis] for axis in "BTFW")
    if state is None:
        state = jnp.zeros((B, W - 1, F), x.dtype)
    check_shapes("causal_conv", {"state": (state, f"{B} {W - 1} {F}")})
    state = state.astype(x.dtype)
    flags = Flags(reset, mask)
    time_axes = sharding_axes("T", T)
    if not time_axes or W == 1:  # a window of one reaches no other step
        return _local(x, kernel, bias, state, flags)

    def local(x, kernel, bias, state, flags):
        before, after = _states_around(x, state, flags, time_axes)
        return _local(x, kernel, bias, before, flags)[0], after

    axes = ("B T F", "W F" if depthwise else "W F J", "F", "B W F", FLAG_AXES)
    # Features that mix are not sharded.
    lengths = {"B": B, "T": T, "F": F} if depthwise else {"B": B, "T": T}
    return map_shards(local, (x, kernel, bias, state, flags), axes, ("B T F", "B W F"), lengths)


def _local(x, kernel, bias, state, flags: Flags):
    """All of time, or the shard that one device has."""
    reset, mask = flags
    if mask is None:
        return _convolve(x, kernel, bias, state, reset)
    packed, order, reset = _pack(flags.zero_masked(x), reset, mask)
    y, _ = _convolve(packed, kernel, bias, state, reset)
    y = flags.zero_masked(_reorder(y, jnp.argsort(order, axis=1), mask))
    return y, _last_inputs(packed, state, reset, jnp.sum(mask, axis=1))


def _pack(x: jax.Array, reset: jax.Array | None, mask: jax.Array):
    """x with its masked steps behind all others; the order of that; resets in this order.

    A masked sequence equals the sequence without those positions: it is convolved in this order, a
    stable sort of "is masked", which is then undone.
    """
    order = jnp.argsort(~mask, axis=1, stable=True)
    packed = _reorder(x, order, mask)
    return packed, order, None if reset is None else _take(reset & mask, order)


def _states_around(x, state, flags: Flags, axes: tuple[str, ...]):
    """The last inputs before this device's shard of time and after the last shard.

    Within a `shard_map`; `state` precedes the first shard. Of earlier shards a device needs the
    last inputs: of the nearest one alone, unless that may have fewer than there are in a state.
    """
    size, (reset, mask) = state.shape[1], flags
    if mask is None:
        mask, packed = jnp.ones(x.shape[:2], bool), x
    else:
        packed, _, reset = _pack(flags.zero_masked(x), reset, mask)
    number = jnp.sum(mask, axis=1)
    own = _last_inputs(packed, jnp.zeros_like(state), reset, number)
    if flags.mask is None and x.shape[1] >= size:
        return nearest_state(state, own, axes)
    # A reset forgets all inputs before it: zeros, too, replace what was there.
    is_reset = False if reset is None else jnp.any(reset, axis=1)
    replaced = jnp.where(is_reset, size, jnp.minimum(number, size))
    return shifted_states(state, own, replaced, axes)


# The taps cost more to save than to rematerialize.
@jax.checkpoint
def _convolve(x, kernel, bias, state, reset):
    W, T = kernel.shape[0], x.shape[1]
    dtype = jnp.result_type(x, kernel)
    window = jnp.concatenate([state, x], axis=1)
    segment = None if reset is None else _segments(reset, W)
    y = jnp.zeros((), dtype)
    for j in range(W):
        tap = window[:, j : j + T]
        if segment is not None and j < W - 1:
            same = segment[:, j : j + T] == segment[:, W - 1 :]
            tap = jnp.where(same[..., None], tap, 0)
        y = y + (tap * kernel[j][None, None] if kernel.ndim == 2 else tap @ kernel[j])
    if bias is not None:
        y = y + bias[None, None]
    if W > 1 and segment is not None:
        # Inputs of an earlier document must not reach the next call.
        is_last = segment == segment[:, -1:]
        window = jnp.where(is_last[..., None], window, 0)
    return materialize_cotangent(y.astype(dtype)), window[:, T:]


def _segments(reset, W):
    """Number of resets seen so far, for the W-1 inputs of the state (0) and every position."""
    return jnp.pad(jnp.cumsum(reset, axis=1), ((0, 0), (W - 1, 0)))


def _last_inputs(packed, state, reset, count):
    """The W-1 inputs before position `count` of packed sequences, zeros before the last reset."""
    W1 = state.shape[1]
    window = jnp.concatenate([state, packed], axis=1)
    index = count[:, None] + jnp.arange(W1)[None]
    last = _take(window, index)
    if reset is None:
        return last
    segment = _segments(reset, W1 + 1)
    # Masked positions hold no reset, so the running count at the end is that of the last document.
    return jnp.where((_take(segment, index) == segment[:, -1:])[..., None], last, 0)


def _reorder(x: jax.Array, order: jax.Array, mask: jax.Array) -> jax.Array:
    """`_take`, skipped where nothing is masked: then the sequence has that order already."""
    return jax.lax.cond(jnp.all(mask), lambda x: x, lambda x: _take(x, order), x)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Steps along axis 1 in the order `index` (B n), each batch entry with its own."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
