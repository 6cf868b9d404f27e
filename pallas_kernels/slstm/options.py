"""What the sLSTM's kernels have in common on every chip: state, flags, options, the contract."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""c, n, h, m: each `B H K` in float32; n = 0 in the initial state."""

RESET, MASKED = 1, 2
"""Bits of a step: the state before it is the initial one; it leaves the state unchanged."""


class Layout(NamedTuple):
    """The order of axes in the arrays of a kernel, where the gradient of weights and bias needs it.

    The bias has the axes of the gates but for time and batch.
    """

    recurrent: str  # einsum of h before each step and the weights to the gates
    weights: str  # einsum of h before each step and the gates to the weights
    time_and_batch: tuple[int, int]  # axes of the gates


class Inputs(NamedTuple):
    """A call in the layout of its kernels, padded."""

    x: jax.Array
    r: jax.Array
    b: jax.Array
    first: jax.Array  # c, n, h and m before the first step, as one array
    flags: jax.Array | None


class Forward(NamedTuple):
    """Results of a forward pass; the last three are None unless they are saved."""

    h: jax.Array  # after each step, in the dtype of x
    last: jax.Array  # c, n, h and m after the last step, float32
    h_saved: jax.Array | None  # what `Kernels.h_before` needs
    seen: Any  # c, n and m as each step sees them, float32
    gates: jax.Array | None  # pre-activations with the recurrent part, float32


class Kernels(NamedTuple):
    """The kernels of one kind of chip; those of TPUs and GPUs keep the same contract."""

    refusal: Callable[..., str | None]  # (K, dtype) -> why no kernel supports them, or None
    tile: Callable[..., Any]  # (B, T, H, K, dtype) -> the tile of a call; may raise ValueError
    layout: Layout
    pad: Callable[..., Inputs]  # (options, x, r, b, state, flags): to the kernels' layout
    unpad: Callable[..., Any]  # (h, last, shape of x) -> h `B T H K`, state
    forward: Callable[..., Forward]  # (options, Inputs, *, save)
    h_before: Callable[..., jax.Array]  # (h_saved, flags) -> h as each step sees it
    backward: Callable[..., Any]  # (options, gates, r, seen, dh, dlast, flags) -> dx, dfirst
    step: Callable[..., State]  # (options, x `B 4 H K`, r, b, state, flags `B 1`): one position
    takes_step: Callable[..., bool]  # (tile, x `B 1 4 H K`, r): whether `step` supports them


class Options(NamedTuple):
    """Static facts of a call; hashable, so that they can be part of a jit cache key."""

    kernels: Kernels
    tile: Any  # what `kernels.tile` has returned
    forget_gate: str
    save_gates: bool
    interpret: Any  # here, as a gradient is traced after the context of `interpreted` has ended
    target: str | None  # the chip to compile for ahead of time
