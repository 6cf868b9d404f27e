"""What all kernels share: where they run, padding to tiles, `vmap`."""

import contextlib
import contextvars
import itertools
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


def folding(
    kernel: Callable[..., Any],
    axes: Sequence[tuple[int | None, int | None]] | None = None,
    out_axes: Sequence[tuple[int, int]] | None = None,
) -> Callable[..., Any]:
    """`kernel`, to whose batch `vmap` adds, or to whose heads where weights are mapped as well.

    A kernel that copies from HBM by itself cannot be given another axis by Pallas.

    Args:
        kernel: its arguments and results are arrays, None, or without `axes` trees of them.
        axes: of every argument the axis of the batch and that of the heads, or None where it has no
            such axis; without `axes` the batch is the first axis everywhere.
        out_axes: the same of every result.
    """
    mapped = jax.custom_batching.custom_vmap(kernel)

    @mapped.def_vmap
    def _(size, is_mapped, *args):
        folded = folding(kernel, axes, out_axes)
        arrays, tree = jax.tree.flatten(args)
        marks = jax.tree.leaves(is_mapped)
        places = [(0, None)] * len(arrays)
        if axes is not None:
            places = [place for place, x in zip(axes, args, strict=True) if x is not None]
        mapped_places = list(itertools.compress(places, marks))
        into = int(any(batch is None for batch, _ in mapped_places))

        def repeat(x, mark):
            return x if mark else jnp.broadcast_to(x, (size, *x.shape))

        if any(place[into] is None for place in mapped_places):  # flags beside mapped weights
            repeated = tree.unflatten(map(repeat, arrays, marks))
            results = jax.lax.map(lambda one: folded(*one), repeated)
            return results, jax.tree.map(lambda _: True, results)

        def join(x, mark, place):
            axis = place[into]
            if axis is None:
                return x
            x = jnp.moveaxis(repeat(x, mark), 0, axis)
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

        def split(x, place):
            axis = place[into]
            x = x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        results = folded(*tree.unflatten(map(join, arrays, marks, places)))
        arrays, tree = jax.tree.flatten(results)
        results = tree.unflatten(map(split, arrays, out_axes or [(0, None)] * len(arrays)))
        return results, jax.tree.map(lambda _: True, results)

    return mapped


def refused_chunk(chunk_size: int | None, tile: int) -> str | None:
    """Why no kernel has chunks of this size, with one that is supported, or None."""
    if chunk_size is None or chunk_size % tile == 0:
        return None
    near = round_up(chunk_size, tile)
    return f"chunk_size={chunk_size} is not a multiple of {tile}, the tile; use {near} or None"


def refused_dtype(dtype: jnp.dtype) -> str | None:
    """Why no kernel computes with `dtype`, or None."""
    if dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        return None
    if dtype == jnp.dtype("float16"):
        return "float16 overflows in exponential gates; use bfloat16 or float32"
    return f"it computes with float32 and bfloat16, not with {dtype}"
