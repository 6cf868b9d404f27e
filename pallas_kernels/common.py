"""What the kernels share: where they run, how arrays are filled up to tiles, exact products."""

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

SCOPED_BYTES = 16 << 20
"""What a kernel may take of VMEM unless it asks for more: all that the smallest TPU has."""

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
    """What is traced inside is meant for `chip`, which need not be here.

    Args:
        chip: a key of `tiles.CHIPS` or of `gpu.CHIPS`.
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
    """The multiple that widths and chunks are filled up to."""
    return _lanes.get()


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def fill(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    """`x` with `value` behind it along `axis`, up to `size`; the same array if none is missing."""
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


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Matrix product over one axis of each, in float32; float32 operands keep all their digits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def compiler_params(semantics: tuple[str, ...], vmem_bytes: int | None) -> Any:
    """What every kernel is compiled with.

    Args:
        semantics: "parallel" or "arbitrary" (in order) for each axis of the grid.
        vmem_bytes: what it may take of VMEM; None is the compiler's default.
    """
    # Here, as whoever asks for the platform alone needs nothing of Pallas.
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.CompilerParams(
        dimension_semantics=semantics,  # pyright: ignore[reportArgumentType]
        vmem_limit_bytes=vmem_bytes,
        # Blocks are whole parts of their arrays, so no copy can leave one: the interpreter raises
        # where it would. The checks cost up to 5 % of all bundles on a v5p.
        disable_bounds_checks=True,
    )


def refused_dtype(dtype: jnp.dtype) -> str | None:
    """Why no kernel computes with `dtype`, or None."""
    if dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        return None
    if dtype == jnp.dtype("float16"):
        return "float16 overflows in exponential gates; use bfloat16 or float32"
    return f"it computes with float32 and bfloat16, not with {dtype}"


def column(row: jax.Array) -> jax.Array:
    """`1 L` to `L 1`, by a mask and a sum: a reshape of lanes to sublanes is not on every chip."""
    return jnp.sum(jnp.where(_diagonal(row.shape[1]), row, 0.0), axis=1, keepdims=True)


def as_row(column: jax.Array) -> jax.Array:
    """`L 1` to `1 L`, by a mask and a sum."""
    return jnp.sum(jnp.where(_diagonal(column.shape[0]), column, 0.0), axis=0, keepdims=True)


def _diagonal(size: int) -> jax.Array:
    square = (size, size)
    rows = jax.lax.broadcasted_iota(jnp.int32, square, 0)
    return rows == jax.lax.broadcasted_iota(jnp.int32, square, 1)
