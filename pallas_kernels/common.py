"""What all kernels share: where they run, padding to tiles, `vmap`."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128
"""Elements in the last axis of a TPU's tile: widths and chunks are multiples of it."""

NEG = -1e30
"""The log of nothing; finite, so that NEG - NEG is 0 and not NaN."""

_interpreter: contextvars.ContextVar[Any] = contextvars.ContextVar("interpreter", default=None)
_lanes: contextvars.ContextVar[int] = contextvars.ContextVar("lanes", default=LANES)
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def interpreted(how: Any = True, *, lanes: int = LANES) -> Iterator[None]:
    """Kernels traced inside run as plain XLA programs, on any device; for tests.

    A kernel asked for by its name then runs where it would refuse; `"auto"` still passes it over.

    Args:
        how: what `pallas_call(interpret=...)` takes: True, or `pltpu.InterpretParams`.
        lanes: the multiple of widths and chunks, in place of 128: small cases stay small.
    """
    tokens = _interpreter.set(how), _lanes.set(lanes)
    try:
        yield
    finally:
        _interpreter.reset(tokens[0])
        _lanes.reset(tokens[1])


@contextlib.contextmanager
def compiled_for(chip: str) -> Iterator[None]:
    """Functions traced inside are compiled ahead of time for `chip`.

    Args:
        chip: a key of `hardware.TPUS` or of `hardware.ARCHITECTURES`.
    """
    token = _target.set(chip)
    try:
        yield
    finally:
        _target.reset(token)


def interpreter() -> Any:
    """What to give `pallas_call` as `interpret`: False outside of `interpreted`."""
    return _interpreter.get() or False


def target() -> str | None:
    """The chip of `compiled_for`, or None."""
    return _target.get()


def lanes() -> int:
    """The multiple that widths and chunks are padded to."""
    return _lanes.get()


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def pad(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    """`x` padded with `value` at the end of `axis`, to `size`; the same array if it has it."""
    missing = size - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=value)


def joining_batch(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, all of whose arguments and results have the batch first; `vmap` adds to the batch.

    A kernel that copies from HBM by itself cannot be given another axis by Pallas.
    """
    mapped = jax.custom_batching.custom_vmap(kernel)

    @mapped.def_vmap
    def _(size, is_mapped, *args):
        def join(x, has_axis):
            x = x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape((-1,) + x.shape[2:])

        results = joining_batch(kernel)(*jax.tree.map(join, args, tuple(is_mapped)))
        results = jax.tree.map(lambda x: x.reshape((size, -1) + x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return mapped


def folding(
    kernel: Callable[..., Any],
    axes: Sequence[tuple[int | None, int | None]],
    out_axes: Sequence[tuple[int, int]],
) -> Callable[..., Any]:
    """`kernel`, to whose batch `vmap` adds, or to whose heads where weights are mapped as well.

    Args:
        kernel: its arguments are arrays or None, its results a tuple of arrays.
        axes: of every argument that of the batch and that of the heads; None: it has none.
        out_axes: the same of every result.
    """
    mapped = jax.custom_batching.custom_vmap(kernel)

    @mapped.def_vmap
    def _(size, is_mapped, *args):
        has_axis = [x is not None and bool(mark) for x, mark in zip(args, is_mapped, strict=True)]
        rows = list(zip(args, has_axis, axes, strict=True))
        into = 1 if any(has and of[0] is None for _, has, of in rows) else 0
        if any(has and of[into] is None for _, has, of in rows):  # flags beside mapped weights
            placed = [x if has or x is None else _repeated(x, size) for x, has, _ in rows]
            found = jax.lax.map(lambda one: folding(kernel, axes, out_axes)(*one), tuple(placed))
            return found, (True,) * len(out_axes)
        found = folding(kernel, axes, out_axes)(
            *(_merged(x, has, of[into], size) for x, has, of in rows)
        )
        results = []
        for x, of in zip(found, out_axes, strict=True):
            axis = of[into]
            x = x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :])
            results.append(jnp.moveaxis(x, axis, 0))
        return tuple(results), (True,) * len(out_axes)

    return mapped


def _repeated(x: jax.Array, size: int) -> jax.Array:
    return jnp.broadcast_to(x, (size, *x.shape))


def _merged(x: jax.Array | None, has_axis: bool, axis: int | None, size: int):
    """`x` with the first of its axes, repeated where it has none, put before `axis` and joined."""
    if x is None or axis is None:
        return x
    x = jnp.moveaxis(x if has_axis else _repeated(x, size), 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def refused_dtype(dtype: jnp.dtype) -> str | None:
    """Why no kernel computes with `dtype`, or None."""
    if dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        return None
    if dtype == jnp.dtype("float16"):
        return "float16 overflows in exponential gates; use bfloat16 or float32"
    return f"it computes with float32 and bfloat16, not with {dtype}"
