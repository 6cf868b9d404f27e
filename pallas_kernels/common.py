"""Shared by all kernels: interpretation, compilation targets, padding and `vmap`."""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128
"""Lanes of a TPU tile (its last axis); head widths and chunks are padded to multiples of it."""

NEG = -1e30
"""Stands for log(0); finite, so that NEG - NEG is 0 and not NaN."""

_interpreter: contextvars.ContextVar[Any] = contextvars.ContextVar("interpreter", default=None)
_lanes: contextvars.ContextVar[int] = contextvars.ContextVar("lanes", default=LANES)
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def interpreted(interpret: Any = True, *, lanes: int = LANES) -> Iterator[None]:
    """Interprets the kernels that are traced in this context, on any device; for tests.

    A kernel that is selected by name then runs on every platform; `"auto"` still skips it.

    Args:
        interpret: argument of `pallas_call`: True, or `pltpu.InterpretParams`.
        lanes: widths and chunks are padded to multiples of this, so that test cases can be small.
    """
    tokens = _interpreter.set(interpret), _lanes.set(lanes)
    try:
        yield
    finally:
        _interpreter.reset(tokens[0])
        _lanes.reset(tokens[1])


@contextlib.contextmanager
def compiled_for(chip: str) -> Iterator[None]:
    """Compiles kernels traced in this context for `chip` of `hardware.TPUS` or `ARCHITECTURES`."""
    token = _target.set(chip)
    try:
        yield
    finally:
        _target.reset(token)


def interpreter() -> Any:
    """The `interpret` argument for `pallas_call`; False outside of `interpreted`."""
    return _interpreter.get() or False


def target() -> str | None:
    """The chip given to `compiled_for`; None outside of it."""
    return _target.get()


def lanes() -> int:
    """Widths and chunks are padded to multiples of this."""
    return _lanes.get()


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def best_chunk(T: int, longest: int, multiple: int) -> int:
    """The chunk up to `longest`, a multiple of `multiple`, for which padding costs least.

    T is padded to full chunks. Shorter chunks store more states: the cost per position is assumed
    to grow by 15 % for each additional time that a chunk fits into the longest one.
    """
    chunks = range(multiple, min(longest, round_up(T, multiple)) + 1, multiple)
    return min(reversed(chunks), key=lambda L: round_up(T, L) * (1 + 0.15 * (longest / L - 1)))


def pad(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    """Pads the end of `axis` with `value` up to `size`; returns `x` itself if it has that size."""
    padding = size - x.shape[axis]
    if not padding:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, padding)
    return jnp.pad(x, widths, constant_values=value)


def fold_vmap(
    kernel: Callable[..., Any],
    axes: Sequence[tuple[int | None, int | None]] | None = None,
    out_axes: Sequence[tuple[int, int]] | None = None,
) -> Callable[..., Any]:
    """`kernel` with a `vmap` rule that folds the mapped axis into the batch, or into the heads.

    It is folded into the heads if an argument without a batch axis (weights) is mapped too. The
    rule replaces that of Pallas, which cannot add a grid axis to a kernel with its own DMAs.

    Args:
        kernel: takes and returns arrays or None; without `axes` also trees of them.
        axes: (batch axis, head axis) of each argument, None where it lacks one; without `axes` the
            batch is the first axis of every array.
        out_axes: the same for each result.
    """
    mapped = jax.custom_batching.custom_vmap(kernel)

    @mapped.def_vmap
    def _(size, is_mapped, *args):
        folded = fold_vmap(kernel, axes, out_axes)
        arrays, tree = jax.tree.flatten(args)
        flags = jax.tree.leaves(is_mapped)
        batch_head = [(0, None)] * len(arrays)
        if axes is not None:
            batch_head = [pair for pair, x in zip(axes, args, strict=True) if x is not None]
        mapped_axes = list(itertools.compress(batch_head, flags))
        # 0: fold into the batch; 1: into the heads.
        into = int(any(batch is None for batch, _ in mapped_axes))

        def broadcast(x, flag):
            return x if flag else jnp.broadcast_to(x, (size, *x.shape))

        # Mapped weights fold into the heads, which mapped resets and masks lack: run one by one.
        if any(pair[into] is None for pair in mapped_axes):
            stacked = tree.unflatten(map(broadcast, arrays, flags))
            results = jax.lax.map(lambda one: folded(*one), stacked)
            return results, jax.tree.map(lambda _: True, results)

        def join(x, flag, pair):
            axis = pair[into]
            if axis is None:
                return x
            x = jnp.moveaxis(broadcast(x, flag), 0, axis)
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

        def split(x, pair):
            axis = pair[into]
            x = x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        results = folded(*tree.unflatten(map(join, arrays, flags, batch_head)))
        arrays, tree = jax.tree.flatten(results)
        results = tree.unflatten(map(split, arrays, out_axes or [(0, None)] * len(arrays)))
        return results, jax.tree.map(lambda _: True, results)

    return mapped


def first_order(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, a part of a derivative, which raises TypeError if it is differentiated itself."""
    kernel = jax.custom_jvp(kernel)

    @kernel.defjvp
    def _(primals, tangents):
        raise TypeError(
            "kernels have first derivatives in reverse mode only; name another implementation, "
            "such as 'recurrent', for second derivatives."
        )

    return kernel


def chunk_refusal(chunk_size: int | None, tile: int) -> str | None:
    """Why this chunk size is not supported, naming one that is; None if it is supported."""
    if chunk_size is None or chunk_size % tile == 0:
        return None
    multiple = round_up(chunk_size, tile)
    return f"chunk_size={chunk_size} is not a multiple of {tile}, the tile; use {multiple} or None"


def dtype_refusal(dtype: jnp.dtype) -> str | None:
    """Why no kernel supports `dtype`; None if they do."""
    if dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        return None
    if dtype == jnp.dtype("float16"):
        return "float16 overflows in exponential gates; use bfloat16 or float32"
    return f"it computes with float32 and bfloat16, not with {dtype}"
