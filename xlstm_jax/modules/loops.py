"""Loops over the blocks of a model: unrolled, or as scans that compile a block once.

Trees of parameters and states are stacked per letter along a leading axis `layers`, in the order of
the pattern. For decoding they are lists of the trees of the layers instead: a slice of a stacked
array would be a copy of every weight for every token.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.modules.patterns import Run
from xlstm_jax.typing import Array, Float, Int, PyTree

ApplyBlock = Callable[
    [str, Float[Array, "B T D"], Any, Int[Array, ""]], tuple[Float[Array, "B T D"], Any]
]
"""(letter, x, (params, state) of one block, its index in the model) -> (x, state)."""

Blocks = Mapping[str, Any]
"""Letter -> stacked (params, state) of its blocks; for `unrolled`, either may be a list."""


def unrolled(
    pattern: str, apply: ApplyBlock, x: Float[Array, "B T D"], blocks: Blocks
) -> tuple[Float[Array, "B T D"], dict[str, list[Any]]]:
    """Applies all blocks in order, compiling each; returns x and lists of the new states."""
    # Equal blocks are traced and differentiated once; XLA compiles each where it is called.
    apply = jax.jit(apply, static_argnums=0)
    remaining = {
        letter: zip(*(as_list(tree, pattern.count(letter)) for tree in trees), strict=True)
        for letter, trees in blocks.items()
    }
    new = {letter: [] for letter in blocks}
    for index, letter in enumerate(pattern):
        x, state = apply(letter, x, next(remaining[letter]), jnp.asarray(index))
        new[letter].append(state)
    return x, new


def as_list(tree: PyTree, num_layers: int) -> list[PyTree]:
    """The trees of the layers, of a list of them, a stacked tree or None."""
    if tree is None:
        return [None] * num_layers
    return tree if isinstance(tree, list) else _unstack(tree)


def scanned(
    runs: tuple[Run, ...],
    apply: ApplyBlock,
    x: Float[Array, "B T D"],
    blocks: Blocks,
    checkpoint: Callable[[Callable], Callable],
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """As `unrolled`, but each run is a scan over its steps; `checkpoint` wraps a step."""
    parts = {}
    for letter, tree in blocks.items():
        counts = [run.pattern.count(letter) for run in runs if letter in run.unit]
        parts[letter] = iter(_split(tree, counts))
    new, first = {letter: [] for letter in blocks}, 0
    for run in runs:
        run_blocks = {letter: next(part) for letter, part in parts.items() if letter in run.unit}
        x, states = _scan_run(run, first, apply, x, run_blocks, checkpoint)
        for letter, state in states.items():
            new[letter].append(state)
        first += run.num_blocks
    return x, {
        letter: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *states)
        for letter, states in new.items()
    }


def _scan_run(run: Run, first: int, apply: ApplyBlock, x, blocks: Blocks, checkpoint):
    """Returns x, and the new states by letter; `first` is the index of the run's first block."""
    # Arrays (letters of the unit, steps): whether the step has this block, its index in the model,
    # and its rank among the run's blocks of the same letter.
    present = np.array([[letter in step for step in run.steps] for letter in run.unit])
    indices = first - 1 + np.cumsum(present.T, dtype=np.int32).reshape(present.T.shape).T
    ranks = np.cumsum(present, axis=1, dtype=np.int32) - 1
    num_steps = present.shape[1]  # as a number: a leaf may be empty
    per_step = {
        letter: iter(_unstack(_reshape(tree, (num_steps, run.unit.count(letter)), 1), axis=1))
        for letter, tree in blocks.items()
        if run.always_has(letter)
    }
    # None for a letter that some steps omit: those steps index into the closed-over `blocks`.
    step_blocks = [next(per_step[letter]) if letter in per_step else None for letter in run.unit]

    def step(x, inputs):
        states = []
        for letter, (index, rank, is_present, block) in zip(run.unit, inputs, strict=True):
            if block is not None:
                x, state = apply(letter, x, block, index)
            else:
                x, state = _apply_if(is_present, letter, apply, x, blocks[letter], rank, index)
            states.append(state)
        return x, states

    xs = list(zip(indices, ranks, present, step_blocks, strict=True))
    x, states = jax.lax.scan(checkpoint(step), x, xs)
    new = {}
    for letter in blocks:
        in_unit = [j for j, other in enumerate(run.unit) if other == letter]
        count = len(in_unit) * num_steps
        new[letter] = _reshape(stack([states[j] for j in in_unit], axis=1), (count,), 2)
        if letter not in per_step:
            # Drop the zeros that steps without the block returned.
            steps = np.flatnonzero(present[in_unit])
            new[letter] = jax.tree.map(lambda a, steps=steps: a[steps], new[letter])
    return x, new


def _apply_if(is_present, letter: str, apply: ApplyBlock, x, blocks, rank, index):
    """Applies a block if the step has it; otherwise returns x, and zeros as the state."""

    def present(x):
        return apply(letter, x, jax.tree.map(lambda leaf: leaf[rank], blocks), index)

    def absent(x):
        return x, jax.tree.map(jnp.zeros_like, jax.eval_shape(present, x)[1])

    return jax.lax.cond(is_present, present, absent, x)


def _split(tree: PyTree, sizes: list[int], axis: int = 0) -> list[PyTree]:
    """Splits along an axis with `jax.lax.split`, whose gradient is a single concatenation."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [jax.lax.split(leaf, sizes, axis=axis) for leaf in leaves]
    return [structure.unflatten([part[i] for part in parts]) for i in range(len(sizes))]


def _unstack(tree: PyTree, axis: int = 0) -> list[PyTree]:
    """The slices along an axis, without that axis."""
    length = jax.tree.leaves(tree)[0].shape[axis]
    parts = _split(tree, [1] * length, axis)
    return [jax.tree.map(lambda leaf: jnp.squeeze(leaf, axis), part) for part in parts]


def stack(trees: list[PyTree], axis: int = 0) -> PyTree:
    """One tree whose leaves have a new axis for the trees."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


def _reshape(tree: PyTree, leading: tuple[int, ...], num_axes: int) -> PyTree:
    """Replaces the first `num_axes` axes of every leaf by the sizes `leading`."""
    return jax.tree.map(lambda a: a.reshape((*leading, *a.shape[num_axes:])), tree)
