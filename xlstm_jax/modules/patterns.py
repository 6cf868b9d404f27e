"""Patterns of one letter per block, and the loops that spell them."""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from xlstm_jax.config import ConfigError


class Run(NamedTuple):
    """A unit of blocks that is compiled once, and the steps of a loop over it."""

    unit: str  # one letter per block
    steps: tuple[str, ...]  # what each step applies: the unit, or the unit without some letters

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self.steps))

    @property
    def pattern(self) -> str:
        return "".join(self.steps)

    def has_always(self, letter: str) -> bool:
        """Whether every step applies all blocks of this letter."""
        return all(step.count(letter) == self.unit.count(letter) for step in self.steps)


def ratio_pattern(ratio: str, num_blocks: int) -> str:
    """xLSTM[a:b] of arXiv:2405.04517: a mLSTM blocks, then b sLSTM blocks, repeated.

    Raises:
        ConfigError: the ratio is not of the form "7:1", or does not fit `num_blocks`.
    """
    match = re.fullmatch(r"(\d+):(\d+)", ratio)
    unit = "m" * int(match[1]) + "s" * int(match[2]) if match else ""
    if not unit:
        raise ConfigError(f"ratio={ratio!r} must be two counts, such as '7:1' (mLSTM : sLSTM).")
    if num_blocks < 1 or num_blocks % len(unit):
        raise ConfigError(
            f"num_blocks must be a multiple of {len(unit)} for ratio={ratio!r}, got {num_blocks}; "
            "change it, or place the blocks with at()."
        )
    return unit * (num_blocks // len(unit))


def at(num_blocks: int, *, slstm: Sequence[int]) -> str:
    """sLSTM blocks at the given positions, counted from 0, and mLSTM blocks elsewhere.

    Raises:
        ConfigError: a position lies outside the model.
    """
    for position in slstm:
        if not 0 <= position < num_blocks:
            raise ConfigError(
                f"slstm={list(slstm)} must hold positions from 0 to {num_blocks - 1}, "
                f"got {position}; drop it or raise num_blocks={num_blocks}."
            )
    return "".join("s" if block in slstm else "m" for block in range(num_blocks))


@functools.lru_cache(maxsize=256)
def split_runs(pattern: str) -> tuple[Run, ...]:
    """A pattern as runs of repeated units, with the fewest letters to compile.

    Ties go to fewer runs, then to uneven ones, then to a shorter first run.
    """

    def cost(runs: tuple[Run, ...]) -> tuple[int, int, int, list[int], tuple[Run, ...]]:
        lengths = [run.num_blocks for run in runs]
        letters, unevenness = sum(len(run.unit) for run in runs), -sum(n**2 for n in lengths)
        return letters, len(runs), unevenness, lengths, runs

    best: dict[int, tuple[Run, ...]] = {len(pattern): ()}  # by the start of the rest
    for start in reversed(range(len(pattern))):
        rest = pattern[start:]
        runs = [
            Run(unit, (unit,) * repeats)
            for unit in itertools.accumulate(rest)
            for repeats in range(1, len(rest) // len(unit) + 1)
            if rest.startswith(unit * repeats)
        ]
        best[start] = min(((run, *best[start + run.num_blocks]) for run in runs), key=cost)
    return best[0]


@functools.lru_cache(maxsize=256)
def find_period(pattern: str) -> Run:
    """The whole pattern as one run, whose unit has every letter once.

    Of all orders of the letters, one with the fewest steps; among these, one in which the fewest
    letters are ever left out.
    """

    def run_of(unit: tuple[str, ...]) -> Run:
        steps = [""]
        for letter in pattern:
            if steps[-1] and unit.index(letter) <= unit.index(steps[-1][-1]):
                steps.append("")
            steps[-1] += letter
        return Run("".join(unit), tuple(steps))

    def cost(run: Run) -> tuple[int, int]:
        return len(run.steps), sum(not run.has_always(letter) for letter in run.unit)

    return min(map(run_of, itertools.permutations(sorted(set(pattern)))), key=cost)
