"""Progress of `prepare`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from xlstm_jax.data.prepare.inputs import InputShard


class Counts(NamedTuple):
    """Counts of tokenized data."""

    documents: int
    tokens: int
    num_bytes: int


class Progress(NamedTuple):
    """Progress of this process, and counts since it started."""

    shards: int  # finished, of its share
    num_shards: int
    size: int  # bytes on disk that were read; an estimate for shards that are not finished
    total_size: int
    counts: Counts


class Totals:
    """Sums of the counts that workers report."""

    def __init__(
        self,
        mine: Sequence[InputShard],
        todo: Sequence[InputShard],
        on_progress: Callable[[Progress], None],
    ):
        self._on_progress, self._num_shards = on_progress, len(mine)
        self._shards, self._total_size = len(mine) - len(todo), sum(s.size for s in mine)
        self._size = self._total_size - sum(shard.size for shard in todo)
        self._counts = Counts(0, 0, 0)
        self._read: dict[int, int] = {}  # bytes of text, of shards that are not finished
        self._finished = 0, 0  # bytes of text, and bytes on disk
        self._report()

    def add(self, shard: InputShard, counts: Counts) -> None:
        """Counts a batch."""
        self._counts = Counts(*map(sum, zip(self._counts, counts, strict=True)))
        self._read[shard.number] = self._read.get(shard.number, 0) + counts.num_bytes
        self._report()

    def finish(self, shard: InputShard) -> None:
        """Counts a finished shard."""
        text, size = self._finished
        self._finished = text + self._read.pop(shard.number, 0), size + shard.size
        self._shards, self._size = self._shards + 1, self._size + shard.size
        self._report()

    def _report(self) -> None:
        # Compressed files, and columns that are not read, make text and disk differ.
        text, size = self._finished
        estimate = int(sum(self._read.values()) * (size / text if text else 1))
        self._on_progress(
            Progress(
                self._shards,
                self._num_shards,
                min(self._size + estimate, self._total_size),
                self._total_size,
                self._counts,
            )
        )
