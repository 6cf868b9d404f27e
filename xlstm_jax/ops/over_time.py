"""Code shared by ops over time: checks of arguments, dispatch, and shards of batch and heads."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.cells.time import vary_like
from xlstm_jax.errors import ArgumentError
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.checks import check_length, check_shapes, fields_with_axes
from xlstm_jax.ops.flags import FLAG_AXES, Flags
from xlstm_jax.ops.sharded.shard_map import LETTERS, is_checked, map_shards
from xlstm_jax.sharding.axes import constrain
from xlstm_jax.typing import Array, Float, Size


class Signature(NamedTuple):
    """An op, and the axes of its arguments and results as words.

    Of these, `B`, `H` and `F` are sharded. Heads of a group share an array with the axis `groups`.
    """

    name: str
    inputs: Any  # a NamedTuple of words
    state: Any  # a NamedTuple of words
    y: str

    def check(self, inputs: Any, state: Any, flags: Flags) -> dict[str, Size]:
        """Raises ValueError unless all shapes agree; returns the sizes of the axes."""
        arrays = fields_with_axes(inputs, self.inputs) | fields_with_axes(flags, FLAG_AXES)
        if state is not None:
            arrays |= fields_with_axes(state, self.state, "state.")
        sizes = check_shapes(self.name, arrays)
        check_length(self.name, sizes)
        return sizes


def run(
    signature: Signature,
    table: Mapping[str, dispatch.Implementation],
    implementation: str,
    inputs: Any,
    state: Any,
    flags: Flags,
    *,
    init: Callable[[Any, jnp.dtype], Any],
    facts: Mapping[str, Any] = {},
    **options: Any,
) -> tuple[Float[Array, "B T ..."], Any]:
    """Checks shapes, selects an implementation and calls `fn(inputs, state, flags, **options)`.

    A sequence sharded over devices is all-gathered, and these devices repeat the computation.

    Args:
        init: (inputs, dtype) -> the initial state, whose leaves have the dtypes of any state;
            `dtype` is that of gates and sums.
        facts: fields of `dispatch.Call` that are known to the op alone.
    """
    sizes = signature.check(inputs, state, flags)
    wide = state_dtype(*jax.tree.leaves(inputs))
    call = dataclasses.replace(_call(sizes, inputs, wide, options), **facts)
    selected = dispatch.choose(signature.name, table, implementation, call)

    def local(inputs, state, flags):
        first = jax.eval_shape(lambda x: init(x, wide), inputs)
        if state is None:  # created here, with the sizes of the device's shard
            state = vary_like(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first), inputs)
        state = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state, first)
        return selected.fn(inputs, state, flags, **options)

    groups = sizes.get("groups", 1)
    lengths = {axis: sizes[axis] for axis in "BHF" if axis in sizes}
    if groups > 1:  # groups are not split; a single one is replicated
        lengths["H"] = groups
    words = jax.tree.map(
        lambda words: words.replace("groups", "H") if groups > 1 else words,
        (signature.inputs, signature.state, FLAG_AXES),
    )
    y, state = map_shards(local, (inputs, state, flags), words, (signature.y, words[1]), lengths)
    # y is replicated over the devices that share a sequence; shard it again for the next layer.
    return constrain(y, *(LETTERS.get(word) for word in signature.y.split())), state


def _call(
    sizes: Mapping[str, Size], inputs: Any, wide: jnp.dtype, options: Mapping[str, Any]
) -> dispatch.Call:
    # A single float64 argument makes the computation float64.
    dtype = jnp.dtype(inputs[0].dtype) if wide == jnp.float32 else wide
    K = sizes.get("K", 1)
    return dispatch.Call(
        sizes["B"],
        sizes["T"],
        sizes.get("H", 1),
        K,
        sizes.get("V", K),
        dtype,
        dispatch.platform(),
        options.get("chunk_size"),
        check_vma=is_checked(inputs),
    )


def check_groups(op: str, name: str, shared: Array, of: str, x: Array) -> None:
    """Raises ValueError unless the number of groups, axis 2 of `shared`, divides that of heads."""
    if min(shared.ndim, x.ndim) > 2 and x.shape[2] % max(shared.shape[2], 1):
        raise ArgumentError(
            f"{op}: the groups of `{name}` must divide the {x.shape[2]} heads of `{of}`, got "
            f"{shared.shape[2]}; share each key among equally many heads."
        )
