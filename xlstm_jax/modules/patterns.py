"""Patterns with one letter per block, and their decomposition into loops."""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from xlstm_jax.errors import ConfigError, quote

MAX_EXACT = 128
"""Letters up to which `split_runs` searches all splits; its time grows with the third power."""

MAX_UNIT = 64
"""Letters of the units that `split_runs` tries in longer patterns."""

MAX_ORDERED = 6
"""Different letters up to which `find_period` tries all orders."""


class Run(NamedTuple):
    """A unit of blocks that is compiled once, and the steps of a scan over it."""

    unit: str  # one letter per block
    steps: tuple[str, ...]  # letters each step applies: all of the unit or a subsequence of it

    @property
    def num_blocks(self) -> int:
        """Blocks that the steps apply in total."""
        return sum(map(len, self.steps))

    @property
    def pattern(self) -> str:
        """The part of the model's pattern that this run covers."""
        return "".join(self.steps)

    def always_has(self, letter: str) -> bool:
        """Whether every step applies all blocks of this letter."""
        return all(step.count(letter) == self.unit.count(letter) for step in self.steps)


def ratio_pattern(ratio: str, num_blocks: int) -> str:
    """Pattern of xLSTM[a:b] (arXiv:2405.04517): a mLSTM blocks, then b sLSTM blocks, repeated.

    Raises:
        ConfigError: the ratio is not of the form "7:1", or a + b does not divide `num_blocks`.
    """
    match = re.fullmatch(r"(\d+):(\d+)", ratio)
    unit = "m" * int(match[1]) + "s" * int(match[2]) if match else ""
    if not unit:
        raise ConfigError(
            f"ratio must be two counts 'mLSTM:sLSTM' that are not both 0, got {quote(ratio)}; try "
            "'7:1'."
        )
    if num_blocks < 1 or num_blocks % len(unit):
        raise ConfigError(
            f"num_blocks must be a multiple of {len(unit)} for ratio={quote(ratio)}, got "
            f"{num_blocks}; change it, or list the sLSTM blocks with at()."
        )
    return unit * (num_blocks // len(unit))


def at(num_blocks: int, *, slstm: Sequence[int]) -> str:
    """Pattern with sLSTM blocks at the indices `slstm`, counted from 0, and mLSTM blocks elsewhere.

    Raises:
        ConfigError: an index is out of range.
    """
    for index in slstm:
        if not 0 <= index < num_blocks:
            raise ConfigError(
                f"slstm={list(slstm)} must list block indices from 0 to {num_blocks - 1}, "
                f"got {index}; drop it or raise num_blocks={num_blocks}."
            )
    indices = frozenset(slstm)
    return "".join("s" if block in indices else "m" for block in range(num_blocks))


@functools.lru_cache(maxsize=256)
def split_runs(pattern: str) -> tuple[Run, ...]:
    """Splits a pattern into runs of repeated units, with the fewest blocks to compile.

    Ties are broken by fewer runs, then more uneven runs, then a shorter first run. In patterns of
    more than `MAX_EXACT` letters, each run is the one that saves most, from the start.
    """
    return _fewest_blocks(pattern) if len(pattern) <= MAX_EXACT else _greedy_runs(pattern)


def _greedy_runs(pattern: str) -> tuple[Run, ...]:
    runs, start = [], 0
    while start < len(pattern):
        candidates = []
        for size in range(1, min(MAX_UNIT, len(pattern) - start) + 1):
            unit, repeats = pattern[start : start + size], 1
            while pattern.startswith(unit, start + repeats * size):
                repeats += 1
            candidates.append(Run(unit, (unit,) * repeats))
        # The first of equals, which has the shortest unit.
        runs.append(max(candidates, key=lambda run: run.num_blocks - len(run.unit)))
        start += runs[-1].num_blocks
    return tuple(runs)


def _fewest_blocks(pattern: str) -> tuple[Run, ...]:
    def cost(runs: tuple[Run, ...]) -> tuple[int, int, int, list[int], tuple[Run, ...]]:
        # The runs themselves come last: the minimum is unique, and so is the compiled program.
        lengths = [run.num_blocks for run in runs]
        letters, unevenness = sum(len(run.unit) for run in runs), -sum(n**2 for n in lengths)
        return letters, len(runs), unevenness, lengths, runs

    # Dynamic programming from the end: start of a suffix -> the best split of that suffix.
    best: dict[int, tuple[Run, ...]] = {len(pattern): ()}
    for start in reversed(range(len(pattern))):
        suffix = pattern[start:]
        runs = [
            Run(unit, (unit,) * repeats)
            for unit in itertools.accumulate(suffix)
            for repeats in range(1, len(suffix) // len(unit) + 1)
            if suffix.startswith(unit * repeats)
        ]
        best[start] = min(((run, *best[start + run.num_blocks]) for run in runs), key=cost)
    return best[0]


@functools.lru_cache(maxsize=256)
def find_period(pattern: str) -> Run:
    """The pattern as a single run whose unit has each letter once.

    Among all orders of the letters, one with the fewest steps is chosen; ties are broken by the
    fewest letters that some step omits. Of more than `MAX_ORDERED` letters, only the order of
    their first blocks is tried.
    """

    def run_of(unit: tuple[str, ...]) -> Run:
        steps = [""]
        for letter in pattern:
            # A new step starts wherever the letters stop following the order of the unit.
            if steps[-1] and unit.index(letter) <= unit.index(steps[-1][-1]):
                steps.append("")
            steps[-1] += letter
        return Run("".join(unit), tuple(steps))

    def cost(run: Run) -> tuple[int, int]:
        return len(run.steps), sum(not run.always_has(letter) for letter in run.unit)

    letters = tuple(dict.fromkeys(pattern))
    is_short = len(letters) <= MAX_ORDERED
    orders = itertools.permutations(sorted(letters)) if is_short else [letters]
    return min(map(run_of, orders), key=cost)
