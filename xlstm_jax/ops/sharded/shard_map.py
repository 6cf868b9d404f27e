"""Ops on a mesh: each device computes its shard of the batch, of the heads and, if possible, time.

A kernel is opaque to XLA's partitioner, which would all-gather its operands. Other implementations
merge chunks, sequences and heads into one axis, which XLA cannot shard. A recurrence mixes neither
sequences nor heads, so a `shard_map` over these axes needs no communication.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from xlstm_jax.cells.time import varying_axes
from xlstm_jax.sharding.axes import dividing_axes, free_axes, mesh_axes_for
from xlstm_jax.typing import Size

LETTERS = {"B": "batch", "T": "time", "H": "heads", "F": "inner"}
"""Axis letters that may be sharded -> logical axes."""


def map_shards(
    fn: Callable[..., Any], args: Any, axes: Any, out_axes: Any, sizes: Mapping[str, Size]
) -> Any:
    """`fn(*args)`, sharded over the active mesh (`jax.set_mesh`) by the rules in use.

    Args:
        fn: computes sequences, heads and, if time is sharded, shards of time independently.
        args: a tuple of pytrees of arrays; None stays None.
        axes: for each argument, its axes as letters, of which those of `LETTERS` may be sharded. A
            tree of such strings for a tree of arrays; ignored if the argument is None.
        out_axes: the same for the results of `fn`.
        sizes: the lengths of the axes to shard; an axis that is left out is replicated. Mesh axes
            that do not divide a length are not used: their devices repeat the computation.

    Within a caller's `shard_map` over all axes, `fn` is called directly.
    """
    auto = auto_mesh_axes()
    if not auto:
        return fn(*args)
    used: dict[str, tuple[str, ...]] = {}
    # A spec uses a mesh axis once; time first, as callers rely on its `sharding_axes`.
    for letter in sorted(sizes, key=lambda letter: letter != "T"):
        taken = {axis for axes in used.values() for axis in axes}
        used[letter] = sharding_axes(letter, sizes[letter], taken)
    # Gradients are summed over mesh axes that no spec names; naming those of size 1 avoids that.
    used["B"] += tuple(sorted(name for name, size in auto.items() if size == 1))

    def spec(letters: str) -> P:
        return P(*(used.get(letter) or None for letter in letters.split()))

    def spec_of(arg: Any, letters: Any) -> P | None:
        return None if arg is None else spec(letters)

    specs = jax.tree.map(spec_of, args, axes, is_leaf=lambda arg: arg is None)
    return shard_mapped(fn, args, specs, jax.tree.map(spec, out_axes))


def auto_mesh_axes() -> dict[str, int]:
    """Sizes of the mesh axes that are not in a caller's `shard_map`; empty on a single device."""
    return free_axes() if jax.sharding.get_abstract_mesh().size > 1 else {}


def is_checked(args: Any) -> bool:
    """Whether `map_shards` calls its function within a `shard_map` that has check_vma=True."""
    return bool(varying_axes(args)) and not auto_mesh_axes()


def shard_mapped(fn: Callable[..., Any], args: Any, specs: Any, out_specs: Any) -> Any:
    """`fn(*args)` on every device's shard, with these partition specs."""
    axes = varying_axes(args)
    if axes:
        args = _map_with_specs(functools.partial(_hide, axes), specs, args)
    results = _shard_map(fn, specs, out_specs)(*args)
    return _map_with_specs(functools.partial(_show, axes), out_specs, results) if axes else results


def _shard_map(fn: Callable[..., Any], specs: Any, out_specs: Any) -> Callable[..., Any]:
    return jax.shard_map(
        fn,
        mesh=jax.sharding.get_abstract_mesh(),
        in_specs=specs,
        out_specs=out_specs,
        axis_names=set(auto_mesh_axes()),  # those of a caller's `shard_map` are manual already
        check_vma=False,  # kernels do not declare how their results vary
    )


# Within a caller's `shard_map` with check_vma=True, types say over which of its axes an array
# varies. Ours has check_vma=False and loses that: arguments drop it and results get it back.
# Neither change of type, nor its transpose, communicates.
def _hide(axes: tuple[str, ...], spec: P, x: jax.Array) -> jax.Array:
    return _linear(lambda x: _drop(x, spec), lambda x: _vary(x, axes), x)


def _show(axes: tuple[str, ...], spec: P, x: jax.Array) -> jax.Array:
    return _linear(lambda x: _vary(x, axes), lambda x: _drop(x, spec), x)


def _vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.pcast(x, axes, to="varying")


def _drop(x: jax.Array, spec: P) -> jax.Array:
    # Not the identity: only the result of an operation has another type.
    return _shard_map(lambda x: jnp.squeeze(x[None], 0), (spec,), spec)(x)


def _linear(fn: Callable[..., Any], transpose: Callable[..., Any], x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return fn(x)
    call = jax.custom_derivatives.linear_call
    return call(lambda _, x: fn(x), lambda _, x: transpose(x), (), x)


def _map_with_specs(fn: Callable[[P, jax.Array], jax.Array], specs: Any, tree: Any) -> Any:
    def of_subtree(spec: P, subtree: Any) -> Any:
        return jax.tree.map(functools.partial(fn, spec), subtree)

    return jax.tree.map(of_subtree, specs, tree, is_leaf=lambda node: isinstance(node, P))


def sharding_axes(letter: str, length: Size, taken: Collection[str] = ()) -> tuple[str, ...]:
    """The mesh axes with more than one device that shard an array axis of this length.

    Those in `taken` shard another axis.
    """
    free = auto_mesh_axes().items()
    sizes = {name: size for name, size in free if size > 1 and name not in taken}
    return dividing_axes(length, mesh_axes_for(LETTERS[letter]), sizes)
