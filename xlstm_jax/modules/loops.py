"""Loops over the blocks of a model: written out, or as scans that compile a block once.

Trees of parameters and states hold all blocks of one letter, in the order of the pattern, behind a
leading axis `layers`.
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
"""(letter, x, parameters and state of one block, its number in the model) -> (x, state)."""

Blocks = Mapping[str, Any]
"""Letter -> the parameters and states of its blocks."""


def one_by_one(
    pattern: str, apply: ApplyBlock, x: Float[Array, "B T D"], blocks: Blocks
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """All blocks in turn, each compiled by itself. Returns x and the new states by letter."""
    left = {letter: iter(_unstack(tree)) for letter, tree in blocks.items()}
    new = {letter: [] for letter in blocks}
    for number, letter in enumerate(pattern):
        x, state = apply(letter, x, next(left[letter]), jnp.asarray(number))
        new[letter].append(state)
    return x, {letter: _stack(states) for letter, states in new.items()}


def scanned(
    runs: tuple[Run, ...],
    apply: ApplyBlock,
    x: Float[Array, "B T D"],
    blocks: Blocks,
    checkpoint: Callable[[Callable], Callable],
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """As `one_by_one`, but each run is a scan over its steps, which `checkpoint` wraps."""
    parts = {}
    for letter, tree in blocks.items():
        counts = [run.pattern.count(letter) for run in runs if letter in run.unit]
        parts[letter] = iter(_split(tree, counts))
    new, number = {letter: [] for letter in blocks}, 0
    for run in runs:
        own = {letter: next(part) for letter, part in parts.items() if letter in run.unit}
        x, states = _scan_run(run, number, apply, x, own, checkpoint)
        for letter, state in states.items():
            new[letter].append(state)
        number += run.num_blocks
    return x, {
        letter: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *states)
        for letter, states in new.items()
    }


def _scan_run(run: Run, first: int, apply: ApplyBlock, x, blocks: Blocks, checkpoint):
    """Returns x, and the new states of the run's blocks by letter; `first` is its first block."""
    # By letter of the unit and step: whether the step has this block, the number of the block in
    # the model, and its rank among the run's blocks of the letter.
    present = np.array([[letter in step for step in run.steps] for letter in run.unit])
    numbers = first - 1 + np.cumsum(present.T, dtype=np.int32).reshape(present.T.shape).T
    ranks = np.cumsum(present, axis=1, dtype=np.int32) - 1
    own = {
        letter: iter(_unstack(_reshape(tree, (-1, run.unit.count(letter)), 1), axis=1))
        for letter, tree in blocks.items()
        if run.has_always(letter)
    }
    # None where some steps leave the letter out.
    inputs = [next(own[letter]) if letter in own else None for letter in run.unit]

    def step(x, now):
        states = []
        for letter, (number, rank, is_present, block) in zip(run.unit, now, strict=True):
            if block is not None:
                x, state = apply(letter, x, block, number)
            else:
                x, state = _apply_if(is_present, letter, apply, x, blocks[letter], rank, number)
            states.append(state)
        return x, states

    xs = list(zip(numbers, ranks, present, inputs, strict=True))
    x, states = jax.lax.scan(checkpoint(step), x, xs)
    new = {}
    for letter in blocks:
        in_unit = [j for j, other in enumerate(run.unit) if other == letter]
        new[letter] = _reshape(_stack([states[j] for j in in_unit], axis=1), (-1,), 2)
        if letter not in own:
            steps = np.flatnonzero(present[in_unit])
            new[letter] = jax.tree.map(lambda a, steps=steps: a[steps], new[letter])
    return x, new


def _apply_if(is_present, letter: str, apply: ApplyBlock, x, blocks, rank, number):
    """A block where the step has it; else x, and zeros for a state."""

    def present(x):
        return apply(letter, x, jax.tree.map(lambda leaf: leaf[rank], blocks), number)

    def absent(x):
        return x, jax.tree.map(jnp.zeros_like, jax.eval_shape(present, x)[1])

    return jax.lax.cond(is_present, present, absent, x)


def _split(tree: PyTree, sizes: list[int], axis: int = 0) -> list[PyTree]:
    """Parts along an axis: `jax.lax.split`, the gradient of which is one concatenation."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [jax.lax.split(leaf, sizes, axis=axis) for leaf in leaves]
    return [structure.unflatten([part[i] for part in parts]) for i in range(len(sizes))]


def _unstack(tree: PyTree, axis: int = 0) -> list[PyTree]:
    """What lies behind each other on an axis."""
    length = jax.tree.leaves(tree)[0].shape[axis]
    parts = _split(tree, [1] * length, axis)
    return [jax.tree.map(lambda leaf: jnp.squeeze(leaf, axis), part) for part in parts]


def _stack(trees: list[PyTree], axis: int = 0) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


def _reshape(tree: PyTree, leading: tuple[int, ...], num_axes: int) -> PyTree:
    """Leaves with other sizes instead of their first `num_axes`."""
    return jax.tree.map(lambda a: a.reshape((*leading, *a.shape[num_axes:])), tree)
