"""Ops and layers on every type of mesh axis; their own code is written for Auto axes.

Explicit axes become Auto ones during a call, and its results are resharded by the rules in use, so
that the sharding is part of their type. Manual axes are those of a caller's `shard_map`: arrays are
local, and if it checks over which axes they vary (check_vma=True), all arrays of a call vary over
the same ones, so that gradients of replicated arguments are summed once, where they enter.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from xlstm_jax.cells.time import vary_like
from xlstm_jax.ops.sharded.shard_map import LETTERS
from xlstm_jax.sharding.axes import mesh_axes_for, partition_spec_for
from xlstm_jax.typing import Array


def on_any_mesh(out_axes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates an op.

    Args:
        out_axes: the axes of its results as letters, of which those of `LETTERS` may be sharded, in
            a tree like the result; or a function of the arguments of the op that returns the
            partition spec of its only result.
    """

    def decorate(op: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(op)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            mesh = jax.sharding.get_abstract_mesh()
            if mesh.empty:
                return op(*args, **kwargs)
            result = call_on_auto_axes(op, args, kwargs)
            if not mesh.explicit_axes:
                return result
            if callable(out_axes):
                return jax.sharding.reshard(result, out_axes(*args, **kwargs))
            return jax.tree.map(shard_explicit, result, out_axes)

        return wrapper

    return decorate


def call_on_auto_axes(fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """`fn(*args, **kwargs)` with Explicit axes as Auto axes, for arrays that vary alike.

    The results are arrays on Auto axes: reshard them to use them after this call.
    """
    args, kwargs = vary_like((args, kwargs), None)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return fn(*args, **kwargs)

    def on_auto_axes(leaf: Any) -> Any:
        return jax.sharding.reshard(leaf, P()) if isinstance(leaf, jax.Array) else leaf

    auto = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(auto):
        args, kwargs = jax.tree.map(on_auto_axes, (args, kwargs))
        return fn(*args, **kwargs)


def shard_explicit(x: Array, letters: str) -> Array:
    """x with the sharding that the rules give on Explicit axes, as a part of its type."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {name: mesh.shape[name] for name in mesh.explicit_axes}
    axes = [mesh_axes_for(LETTERS.get(letter)) for letter in letters.split()]
    return jax.sharding.reshard(x, partition_spec_for(x.shape, axes, sizes))


def spec_of_product(x: Array, kernel: Any, **options: Any) -> P:
    """The spec of x @ kernel: batch dimensions are sharded like those of x, features like those of
    the kernel."""
    *batch, _ = spec_of(x)
    *_, features = spec_of(jax.tree.leaves(kernel)[0])  # the values of an `Int8Kernel`
    used = {axis for axes in batch for axis in _names(axes)}
    return P(*batch, tuple(axis for axis in _names(features) if axis not in used) or None)


def spec_of_groups(x: Array, kernel: Array, **options: Any) -> P:
    """The spec of a product within groups: that of x, if its devices divide the output features."""
    *batch, features = spec_of(x)
    mesh = jax.sharding.get_abstract_mesh()
    num_shards = math.prod(mesh.shape[axis] for axis in _names(features))
    return P(*batch, features if kernel.shape[0] * kernel.shape[2] % num_shards == 0 else None)


def spec_of(x: Array, *args: Any, **options: Any) -> P:
    """The partition spec of an array on Explicit axes, with an entry per dimension."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return P(*spec, *(None,) * (x.ndim - len(spec)))


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()
