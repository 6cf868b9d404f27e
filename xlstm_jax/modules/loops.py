"""Loops over the blocks of a model: written out, or as scans that compile a block once.

Trees of parameters and states hold all blocks of one letter, in the order of the pattern, behind a
leading axis `layers`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.modules.patterns import Run
from xlstm_jax.typing import Array, Bool, Float, Int, PyTree

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
    """As `one_by_one`, run after run, each a scan over its steps.

    Args:
        runs: they spell the pattern.
        checkpoint: wraps the function of one step.
    """
    parts = {
        letter: iter(
            _split(tree, [run.pattern.count(letter) for run in runs if letter in run.unit])
        )
        for letter, tree in blocks.items()
    }
    new, number = {letter: [] for letter in blocks}, 0
    for run in runs:
        own = {letter: next(part) for letter, part in parts.items() if letter in run.unit}
        x, states = _scan_run(run, number, apply, x, own, checkpoint)
        for letter, state in states.items():
            new[letter].append(state)
        number += run.num_blocks
    return x, {letter: _concatenate(states) for letter, states in new.items()}


def _scan_run(run: Run, first: int, apply: ApplyBlock, x, blocks: Blocks, checkpoint):
    always = [run.has_always(letter) for letter in run.unit]

    def step(x, now):
        states = []
        for letter, is_always, (block, own) in zip(run.unit, always, now, strict=True):
            if is_always:
                x, state = apply(letter, x, own, block.number)
            else:
                x, state = _apply_if(block, letter, apply, x, blocks[letter])
            states.append(state)
        return x, tuple(states)

    step_blocks = _step_blocks(run, first)
    xs = tuple(zip(step_blocks, _inputs(run, blocks), strict=True))
    x, states = jax.lax.scan(checkpoint(step), x, xs)
    return x, _by_letter(run, step_blocks, states)


class _StepBlock(NamedTuple):
    """The block of a letter of the unit, per step."""

    number: Int[Array, "*steps"]  # in the model
    rank: Int[Array, "*steps"]  # among the run's blocks of this letter
    present: Bool[Array, "*steps"]


def _step_blocks(run: Run, first: int) -> list[_StepBlock]:
    """One per letter of the unit; `first` is the number of the run's first block."""
    table = np.zeros((len(run.unit), 3, len(run.steps)), np.int32)
    seen, number = dict.fromkeys(run.unit, 0), first
    for n, step in enumerate(run.steps):
        left = list(step)
        for j, letter in enumerate(run.unit):
            present = left[:1] == [letter]
            table[j, :, n] = number, seen[letter], present
            if present:
                left.pop(0)
                seen[letter] += 1
                number += 1
    return [_StepBlock(numbers, ranks, present > 0) for numbers, ranks, present in table]


def _inputs(run: Run, blocks: Blocks) -> list[Any]:
    """Per letter of the unit, what each step is to read; None where some steps leave it out."""
    own = {
        letter: iter(_unstack(_grouped(tree, run.unit.count(letter)), axis=1))
        for letter, tree in blocks.items()
        if run.has_always(letter)
    }
    return [next(own[letter]) if letter in own else None for letter in run.unit]


def _apply_if(block: _StepBlock, letter: str, apply: ApplyBlock, x, all_blocks):
    """A block of this step, if it has one; else x, and zeros for a state."""

    def present(x):
        own = jax.tree.map(lambda leaf: leaf[block.rank], all_blocks)
        return apply(letter, x, own, block.number)

    def absent(x):
        return x, jax.tree.map(jnp.zeros_like, jax.eval_shape(present, x)[1])

    return jax.lax.cond(block.present, present, absent, x)


def _by_letter(run: Run, step_blocks: list[_StepBlock], states: tuple[Any, ...]) -> dict[str, Any]:
    """States of the run's blocks from those of every letter of the unit and step."""
    by_letter = {}
    for letter in dict.fromkeys(run.unit):
        own = [
            (p, s)
            for p, s, other in zip(step_blocks, states, run.unit, strict=True)
            if other == letter
        ]
        if run.has_always(letter):
            stacked = _stack([state for _, state in own], axis=1)
            by_letter[letter] = jax.tree.map(lambda a: a.reshape((-1, *a.shape[2:])), stacked)
        else:
            ((block, state),) = own
            steps = np.flatnonzero(block.present)
            by_letter[letter] = jax.tree.map(lambda a, steps=steps: a[steps], state)
    return by_letter


def _grouped(tree: PyTree, size: int) -> PyTree:
    return jax.tree.map(lambda a: a.reshape((-1, size, *a.shape[1:])), tree)


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


def _concatenate(trees: list[PyTree]) -> PyTree:
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *trees)
