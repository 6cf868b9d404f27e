"""Mixtures of data sets: the source of every sequence is a pure function of its number."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from xlstm_jax.data import hashing
from xlstm_jax.data.batch import Batch, Examples
from xlstm_jax.errors import ConfigError

_UNITS = 1 << 20  # weights are integers of this sum, so shares stay exact over any number
_MIN_CYCLE = 1024  # sequences; at its end the shares are exact to a sequence of each source


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Draws sources by weight, without state.

    Sequences form cycles. Each has a fixed number of sequences of every source, the rounding error
    of earlier cycles included, in a random order.
    """

    weights: tuple[tuple[float, ...], ...]  # of every phase, one per source
    starts: tuple[int, ...]  # first sequence of every phase, the first being 0
    seed: int

    def draw(
        self, sequence: Int64[np.ndarray, "N"]
    ) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
        """The source of each sequence, and how many sequences of this source precede it."""
        source, rank = np.empty_like(sequence), np.empty_like(sequence)
        phases = np.searchsorted(self.starts, sequence, side="right") - 1
        cycles, index = np.divmod(sequence - np.take(self.starts, phases), self._size)
        for phase, cycle in set(zip(phases.tolist(), cycles.tolist(), strict=True)):
            chosen = np.flatnonzero((phases == phase) & (cycles == cycle))
            sources, ranks = _cycle(self, phase, cycle)
            source[chosen], rank[chosen] = sources[index[chosen]], ranks[index[chosen]]
        return source, rank

    def counts(self, sequences: int) -> list[int]:
        """Sequences of every source among the first ones."""
        phase = int(np.searchsorted(self.starts, sequences, side="right")) - 1
        drawn = self._drawn(phase, sequences - self.starts[phase])
        return (self.before[phase] + drawn).tolist()

    def total(self, phase: int, cycles: int) -> Int64[np.ndarray, "S"]:
        """Sequences of every source in the first cycles of a phase."""
        size, units = cycles * self._size, self._units[phase]
        counts = units * size // _UNITS
        # The largest source takes what rounding leaves: at most one for each other source.
        largest = int(np.argmax(units))
        counts[largest] += size - counts.sum()
        return counts

    @functools.cached_property
    def _units(self) -> list[Int64[np.ndarray, "S"]]:
        """The weights of every phase, in units."""
        return [
            np.rint(np.array(weights) / sum(weights) * _UNITS).astype(np.int64)
            for weights in self.weights
        ]

    @property
    def _size(self) -> int:
        """Sequences of a cycle: enough for the largest source to have some in each."""
        return max(_MIN_CYCLE, 2 * len(self.weights[0]) ** 2)

    @functools.cached_property
    def before(self) -> list[Int64[np.ndarray, "S"]]:
        """Sequences of every source before each phase."""
        counts = [np.zeros(len(self.weights[0]), np.int64)]
        for phase, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            counts.append(counts[-1] + self._drawn(phase, stop - start))
        return counts

    def _drawn(self, phase: int, sequences: int) -> Int64[np.ndarray, "S"]:
        """Sequences of every source among the first of a phase; its last cycle is incomplete."""
        cycles, rest = divmod(sequences, self._size)
        last = np.bincount(_order(self, phase, cycles)[:rest], minlength=len(self.weights[0]))
        return self.total(phase, cycles) + last


def _order(schedule: Schedule, phase: int, cycle: int) -> Int64[np.ndarray, "N"]:
    """The sources of a cycle, in order."""
    count = schedule.total(phase, cycle + 1) - schedule.total(phase, cycle)
    size = int(count.sum())
    key = hashing.key(schedule.seed, schedule.starts[phase], cycle)
    slot = hashing.permute(np.arange(size), size, np.repeat(key, size))
    return np.searchsorted(np.cumsum(count), slot, side="right")


@functools.lru_cache(maxsize=8)
def _cycle(
    schedule: Schedule, phase: int, cycle: int
) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
    """The source and the rank of every sequence of a cycle."""
    source = _order(schedule, phase, cycle)
    rank, before = np.empty_like(source), schedule.before[phase] + schedule.total(phase, cycle)
    for number in np.unique(source):
        chosen = np.flatnonzero(source == number)
        rank[chosen] = before[number] + np.arange(len(chosen))
    return source, rank


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """The windows of several data sets, numbered one after another."""

    sources: Mapping[str, Examples]

    shuffle = True

    def __post_init__(self):
        check_tokenizers("data.sources", self.sources)

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer of all sources."""
        return next(iter(self.sources.values())).vocab_size

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of all sources; None for samples of tasks."""
        return getattr(next(iter(self.sources.values())), "tokenizer", None)

    @property
    def description(self) -> dict[str, Any]:
        """The descriptions of the sources, by name."""
        return {name: examples.description for name, examples in self.sources.items()}

    @functools.cached_property
    def offsets(self) -> Int64[np.ndarray, "S"]:
        """The number of the first window of each source."""
        sizes = [len(examples) for examples in self.sources.values()]
        return np.cumsum([0, *sizes[:-1]])

    def __len__(self) -> int:
        """Windows of all sources."""
        return int(self.offsets[-1]) + len([*self.sources.values()][-1])

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The windows with these indices, each of its source."""
        numbers = np.searchsorted(self.offsets, index, side="right") - 1
        positions, parts = [], []
        for number, examples in enumerate(self.sources.values()):
            if (mine := np.flatnonzero(numbers == number)).size:
                positions.append(mine)
                parts.append(examples.batch(index[mine] - self.offsets[number]))
        joined = map(np.concatenate, zip(*(part[:-1] for part in parts), strict=True))
        back = np.argsort(np.concatenate(positions))
        return Batch(*(leaf[back] for leaf in joined), index=index)


def check_tokenizers(where: str, sources: Mapping[str, Examples]) -> None:
    """Raises ConfigError unless all data sets have one tokenizer; samples of tasks have none."""
    kinds = {
        name: (examples.vocab_size, getattr(getattr(examples, "tokenizer", None), "sha256", None))
        for name, examples in sources.items()
    }
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{size} ids in {name}" for name, (size, _) in kinds.items())
        raise ConfigError(
            f"{where} must have one tokenizer, got several ({listed}); prepare them with the same "
            "one, or pass that of the prepared data as data.tokenizer."
        )
