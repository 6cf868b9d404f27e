"""Causal convolution over time, with a state, resets and masks.

Source: arXiv:2405.04517, appendix (window 4 before the mLSTM and sLSTM gates).
"""

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import common_dtype
from xlstm_jax.cells.time import vary_like
from xlstm_jax.ops.checks import check_length, check_shapes
from xlstm_jax.ops.cpu import materialize_cotangent
from xlstm_jax.ops.flags import FLAG_AXES, Flags
from xlstm_jax.ops.gradient import with_backward
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.ops.sharded.halo import state_from_neighbor, states_from_all_shards
from xlstm_jax.ops.sharded.shard_map import map_shards, sharding_axes
from xlstm_jax.typing import Array, Flag, Float


@on_any_mesh(("B T F", "B W F"))
def causal_conv(
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"] | Float[Array, "W F F_out"],
    bias: Float[Array, "F_out"] | None = None,
    state: Float[Array, "B W-1 F"] | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
) -> tuple[Float[Array, "B T F_out"], Float[Array, "B W-1 F"]]:
    """y[t] = bias + sum over j of kernel[j] * x[t - (W-1) + j]; kernel[W-1] is the current step's.

    Args:
        kernel: depthwise, one window per channel `W F`, or mixing channels `W F_in F_out`.
        bias: added to every output.
        state: the W-1 inputs before the first step, oldest first; None means zeros.
        reset: where True, earlier inputs are zeros for this and all later positions.
        mask: where False, the position is skipped: y is 0, later windows do not include its
            input, and its reset is ignored.

    Returns y, and the last W-1 inputs, oldest first: the `state` of the next call.

    Raises:
        ValueError: inconsistent shapes.
    """
    depthwise, flags = kernel.ndim == 2, Flags.of(reset, mask)
    sizes = check_shapes(
        "causal_conv",
        {
            "x": (x, "B T F"),
            "kernel": (kernel, "W F" if depthwise else "W F F_out"),
            "bias": (bias, "F" if depthwise else "F_out"),
            "reset": (flags.reset, "B T"),
            "mask": (flags.mask, "B T"),
        },
    )
    check_length("causal_conv", sizes)
    B, T, F, W = (sizes[axis] for axis in "BTFW")
    if state is None:
        state = jnp.zeros((B, W - 1, F), x.dtype)
    check_shapes("causal_conv", {"state": (state, f"{B} {W - 1} {F}")})
    state = vary_like(state.astype(x.dtype), x)
    time_axes = sharding_axes("T", T)
    if not time_axes or W == 1:  # a window of one step needs no inputs of other shards
        return _masked_convolve(x, kernel, bias, state, flags)

    def local(x, kernel, bias, state, flags):
        before, after = _boundary_states(x, state, flags, time_axes)
        return _masked_convolve(x, kernel, bias, before, flags)[0], after

    axes = ("B T F", "W F" if depthwise else "W F J", "F", "B W F", FLAG_AXES)
    # A kernel that mixes channels needs all of them on every device.
    lengths = {"B": B, "T": T, "F": F} if depthwise else {"B": B, "T": T}
    return map_shards(local, (x, kernel, bias, state, flags), axes, ("B T F", "B W F"), lengths)


def shift(
    x: Float[Array, "B T F"],
    state: Float[Array, "B 1 F"] | None = None,
    *,
    reset: Flag | None = None,
    mask: Flag | None = None,
) -> tuple[Float[Array, "B T F"], Float[Array, "B 1 F"]]:
    """The input of the step before, 0 at the start of a document; arguments as of `causal_conv`."""
    before = jnp.concatenate([jnp.ones((1, x.shape[-1]), x.dtype), jnp.zeros_like(x[0, :1])])
    return causal_conv(x, before, None, state, reset=reset, mask=mask)


def _masked_convolve(x, kernel, bias, state, flags: Flags):
    """The convolution of the full sequence, or of one device's shard of it."""
    reset, mask = flags
    if mask is None:
        return _convolve(x, kernel, bias, state, reset)
    packed, order, reset = _move_masked_to_end(flags.zero_masked(x), reset, mask)
    y, _ = _convolve(packed, kernel, bias, state, reset)
    y = flags.zero_masked(_reorder(y, jnp.argsort(order, axis=1), mask))
    return y, _last_inputs(packed, state, reset, jnp.sum(mask, axis=1))


def _move_masked_to_end(x: jax.Array, reset: jax.Array | None, mask: jax.Array):
    """x with its masked steps at the end, the permutation, and the resets in the new order.

    A masked sequence equals the sequence without the masked positions. So it is convolved in this
    order, a stable sort by "is masked", and the outputs are permuted back.
    """
    # Stable: valid steps keep their order.
    order = jnp.argsort(~mask, axis=1, stable=True)
    packed = _reorder(x, order, mask)
    return packed, order, None if reset is None else _take(reset & mask, order)


def _boundary_states(x, state, flags: Flags, axes: tuple[str, ...]):
    """The last inputs before this device's shard of the sequence, and after the last shard.

    Call within a `shard_map`; `state` precedes the first shard. A device needs the last inputs of
    the previous shard only, unless that shard may have fewer inputs than a state.
    """
    state_size, (reset, mask) = state.shape[1], flags
    if mask is None:
        mask, packed = jnp.ones(x.shape[:2], bool), x
    else:
        packed, _, reset = _move_masked_to_end(flags.zero_masked(x), reset, mask)
    num_inputs = jnp.sum(mask, axis=1)
    shard_last = _last_inputs(packed, jnp.zeros_like(state), reset, num_inputs)
    if flags.mask is None and x.shape[1] >= state_size:
        return state_from_neighbor(state, shard_last, axes)
    # A reset in the shard discards all earlier inputs: the zeros of `shard_last` replace them.
    is_reset = False if reset is None else jnp.any(reset, axis=1)
    num_replaced = jnp.where(is_reset, state_size, jnp.minimum(num_inputs, state_size))
    return states_from_all_shards(state, shard_last, num_replaced, axes)


def _convolve(x, kernel, bias, state, reset):
    W, T = kernel.shape[0], x.shape[1]
    dtype = common_dtype(x.dtype, kernel.dtype)
    segment = None if reset is None else _segments(reset, W)
    # The taps of a mixing kernel cost more to save than to rematerialize.
    compute = _depthwise if kernel.ndim == 2 else jax.checkpoint(_sum_of_taps)
    y = compute(x, kernel, state, segment)
    if bias is not None:
        y = y + bias[None, None]
    last = jnp.concatenate([state, x], axis=1)[:, T:]
    if W > 1 and segment is not None:
        # Inputs of an earlier document must not leak into the next call.
        is_last_segment = segment[:, T:] == segment[:, -1:]
        last = jnp.where(is_last_segment[..., None], last, 0)
    return materialize_cotangent(y.astype(dtype)), last


def _sum_of_taps(x, kernel, state, segment):
    """A sum of W shifted products, as W is small."""
    W, T = kernel.shape[0], x.shape[1]
    window = jnp.concatenate([state, x], axis=1)
    y = jnp.zeros((), common_dtype(x.dtype, kernel.dtype))
    for j in range(W):
        tap = _same_segment(window[:, j : j + T], segment, j)
        y = y + (tap * kernel[j][None, None] if kernel.ndim == 2 else tap @ kernel[j])
    return y


def _same_segment(a, segment, j: int):
    """a, `B T F`, where input t - (W-1) + j is in the segment of position t, else 0."""
    T = a.shape[1]
    if segment is None or segment.shape[1] == j + T:
        return a
    return jnp.where((segment[:, j : j + T] == segment[:, -T:])[..., None], a, 0)


def _depthwise_backward(residuals, dy):
    # Shifts dy and not x: of x, shifted copies would be saved from the forward pass.
    x, kernel, state, segment = residuals
    W, size = kernel.shape[0], state.shape[1]
    dwindow, dkernel = jnp.zeros((), dy.dtype), []
    for j in range(W):
        shifts = ((0, 0), (j, W - 1 - j), (0, 0))
        dtap = jnp.pad(_same_segment(dy, segment, j), shifts)
        dwindow = dwindow + dtap * kernel[j][None, None]
        by_part = (dtap[:, :size], state), (dtap[:, size:], x)
        dkernel.append(sum(jnp.sum(d * part, axis=(0, 1)) for d, part in by_part))
    dkernel = jnp.stack(dkernel).astype(kernel.dtype)
    return dwindow[:, size:].astype(x.dtype), dkernel, dwindow[:, :size].astype(x.dtype), None


_depthwise = with_backward(lambda *args: (_sum_of_taps(*args), args), _depthwise_backward)
"""(x, kernel, state, segment) -> y, without a bias."""


def _segments(reset, W):
    """Running count of resets for every position, after W-1 zeros for the inputs of the state."""
    return jnp.pad(jnp.cumsum(reset, axis=1), ((0, 0), (W - 1, 0)))


def _last_inputs(packed, state, reset, num_inputs):
    """The W-1 inputs before position `num_inputs` of packed sequences, 0 before the last reset."""
    state_size = state.shape[1]
    # The window has the state in front, so the last inputs start at index `num_inputs`.
    window = jnp.concatenate([state, packed], axis=1)
    index = num_inputs[:, None] + jnp.arange(state_size)[None]
    last = _take(window, index)
    if reset is None:
        return last
    segment = _segments(reset, state_size + 1)
    # Masked positions have no reset, so the running count at the end is that of the last document.
    return jnp.where((_take(segment, index) == segment[:, -1:])[..., None], last, 0)


def _reorder(x: jax.Array, order: jax.Array, mask: jax.Array) -> jax.Array:
    """`_take`, skipped if nothing is masked: the permutation is then the identity."""
    return jax.lax.cond(jnp.all(mask), lambda x: x, lambda x: _take(x, order), x)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Steps along axis 1 in the order `index` (B n), which differs per sequence."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
