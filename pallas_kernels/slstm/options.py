"""Shared by the sLSTM kernels of every backend: state, flags, options, the `Kernels` contract."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""c, n, h, m: each `B H K` in float32; n = 0 until the first write."""

RESET, MASKED = 1, 2
"""Bits of the flags of a step: reset the state before the step; leave the state unchanged."""


class Layout(NamedTuple):
    """The axis order of a backend's arrays, as the gradients of weights and bias need it.

    The bias has the axes of the gates without time and batch.
    """

    recurrent: str  # einsum: h before each step, weights -> gates
    weights: str  # einsum: h before each step, gates -> weights
    time_and_batch: tuple[int, int]  # axes of the gates


class Inputs(NamedTuple):
    """The arrays of a call, padded and in the layout of the kernels."""

    x: jax.Array
    r: jax.Array
    b: jax.Array
    initial: jax.Array  # c, n, h and m before the first step, stacked
    flags: jax.Array | None


class Forward(NamedTuple):
    """Results of a forward pass; the last three are residuals, None unless they are saved."""

    h: jax.Array  # after each step, in the dtype of x
    final: jax.Array  # c, n, h and m after the last step, float32
    h_saved: jax.Array | None  # argument of `Kernels.h_before`
    cnm: Any  # c, n and m before each step, with its reset applied; float32
    gates: jax.Array | None  # pre-activations, recurrent term included, float32


class Kernels(NamedTuple):
    """The kernels of one backend; TPU and GPU kernels implement the same contract."""

    refusal: Callable[..., str | None]  # (K, dtype) -> why no kernel supports them, or None
    tile: Callable[..., Any]  # (B, T, H, K, dtype) -> the tile of a call; may raise ValueError
    layout: Layout
    pad: Callable[..., Inputs]  # (options, x, r, b, state, flags): to the kernels' layout
    unpad: Callable[..., Any]  # (h, final, shape of x) -> h `B T H K`, state
    forward: Callable[..., Forward]  # (options, Inputs, *, save)
    h_before: Callable[..., jax.Array]  # (h_saved, flags) -> h before each step, reset applied
    backward: Callable[..., Any]  # (options, gates, r, cnm, dh, dfinal, flags) -> dx, dinitial
    step: Callable[..., Any]  # (options, x `B 4 H K`, r, b, state, flags `B 1`) -> h, state
    supports_step: Callable[..., bool]  # (tile, x `B 1 4 H K`, r): whether `step` supports them


class Options(NamedTuple):
    """Static options of a call; hashable, so that they can be part of a jit cache key."""

    kernels: Kernels
    tile: Any  # result of `kernels.tile`
    forget_gate: str
    save_gates: bool
    interpret: Any  # stored because a gradient is traced after the `interpreted` context has ended
    target: str | None  # the chip to compile for ahead of time
