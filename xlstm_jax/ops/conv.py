"""Causal convolution over time, with a state, resets and masks.

Source: arXiv:2405.04517, appendix (window 4 before the mLSTM and sLSTM gates).
"""

import functools

import jax
import jax.numpy as jnp

from xlstm_jax.ops.checks import check_length, check_shapes
from xlstm_jax.ops.once import gradient_computed_once
from xlstm_jax.ops.sharded import cut_by, per_device
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
    B, T, F = x.shape if x.ndim == 3 else (0, 0, 0)
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
    W = sizes["W"]
    if state is None:
        state = jnp.zeros((B, W - 1, F), x.dtype)
    check_shapes("causal_conv", {"state": (state, f"{B} {W - 1} {F}")})
    state = state.astype(x.dtype)
    spans = cut_by("T", T)
    if not spans or W == 1:  # a window of one reaches nowhere
        return _whole(x, kernel, bias, state, reset, mask)
    F = "F" if depthwise else "G"  # features that mix are not cut
    axes = ("B T F", "W F", "F", "B W F", "B T", "B T")
    args = (x, kernel, bias, state, reset, mask)
    axes = tuple(None if a is None else n.replace("F", F) for a, n in zip(args, axes, strict=True))
    axes = axes if depthwise else (axes[0], "W G J", *axes[2:])
    lengths = {"B": B, "T": T} | ({"F": sizes["F"]} if depthwise else {})
    run = functools.partial(_span, spans)
    return per_device(run, args, axes, (f"B T {F}", f"B W {F}"), lengths)


def _whole(x, kernel, bias, state, reset, mask):
    """All of time at once, or as much of it as one device has."""
    if mask is None:
        return _convolve(x, kernel, bias, state, reset)
    if kernel.shape[0] == 1:
        y, _ = _convolve(jnp.where(mask[..., None], x, 0), kernel, bias, state, None)
        return jnp.where(mask[..., None], y, 0), state
    # A masked row is the row without those positions: move them behind the rest, convolve, and
    # move everything back. The order of a stable sort of "is masked" does that.
    x = jnp.where(mask[..., None], x, 0)
    order = jnp.argsort(~mask, axis=1, stable=True)
    packed = _reorder(x, order, mask)
    reset = None if reset is None else _take(reset & mask, order)
    y, _ = _convolve(packed, kernel, bias, state, reset)
    y = jnp.where(mask[..., None], _reorder(y, jnp.argsort(order, axis=1), mask), 0)
    return y, _last_inputs(packed, state, reset, jnp.sum(mask, axis=1))


def _span(axes: tuple[str, ...], x, kernel, bias, state, reset, mask):
    """One device's span of time, within a `shard_map`; `state` stands before the first span.

    Of the spans before it a device needs their last inputs: of the nearest one alone, unless that
    may have fewer than there are in a state.
    """
    W1, count, rank = state.shape[1], jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    own, number = _left_behind(x, jnp.zeros_like(state), reset, mask)
    if mask is None and x.shape[1] >= W1:
        last = jnp.where(rank == count - 1, own, 0)
        sent = jax.lax.ppermute(own, axes, [(j, j + 1) for j in range(count - 1)])
        first = jnp.where(rank == 0, state, sent)
        y, _ = _whole(x, kernel, bias, first, reset, mask)
        return y, jax.lax.psum(last, axes)
    spans = jax.lax.all_gather((own, number), axes)
    first = last = state
    for j in range(count):
        last = _shifted(last, spans[0][j], spans[1][j])
        first = jnp.where(j < rank, last, first)
    y, _ = _whole(x, kernel, bias, first, reset, mask)
    return y, last


def _left_behind(x, empty, reset, mask):
    """The last inputs of a span, zeros before them, and how many of a state they replace."""
    W1 = empty.shape[1]
    if mask is None:
        mask = jnp.ones(x.shape[:2], bool)
        packed = x
    else:
        x = jnp.where(mask[..., None], x, 0)
        order = jnp.argsort(~mask, axis=1, stable=True)
        packed = _reorder(x, order, mask)
        reset = None if reset is None else _take(reset & mask, order)
    number = jnp.sum(mask, axis=1)
    last = _last_inputs(packed, empty, reset, number)
    # A reset forgets all inputs before it: zeros, too, replace what was there.
    cut = False if reset is None else jnp.any(reset, axis=1)
    return last, jnp.where(cut, W1, jnp.minimum(number, W1))


def _shifted(state, inputs, number):
    """A state after a span: as many of its oldest inputs as the span replaces have left it."""
    W1 = state.shape[1]
    index = jnp.arange(W1)[None] + number[:, None]
    kept = _take(state, jnp.minimum(index, W1 - 1))
    return jnp.where((index < W1)[..., None], kept, inputs)


# The taps cost more to keep than to make again.
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
        alive = segment == segment[:, -1:]
        window = jnp.where(alive[..., None], window, 0)
    return gradient_computed_once(y.astype(dtype)), window[:, T:]


def _segments(reset, W):
    """Number of resets seen so far, for the W-1 inputs of the state (0) and every position."""
    return jnp.pad(jnp.cumsum(reset, axis=1), ((0, 0), (W - 1, 0)))


def _last_inputs(packed, state, reset, count):
    """The W-1 inputs before position `count` of each packed row, zeros before its last reset."""
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
    """`_take`, spared where nothing is masked: then the order is that of the row already."""
    return jax.lax.cond(jnp.all(mask), lambda x: x, lambda x: _take(x, order), x)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of axis 1 in the order `index` (B n), each batch entry with its own."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
