"""The sequences of a run, in order: the batch of a step is a pure function of the step.

Sequence b of a step is element `start + b` of an endless stream of epochs, where `start` counts the
sequences of earlier steps. Each epoch is a permutation of the windows. The progress of a run in its
data is therefore one integer, valid for any number of hosts and of worker processes.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int64

from xlstm_jax.data.batch import Batch, Examples
from xlstm_jax.data.batch_sizes import BatchSizes
from xlstm_jax.data.config import DataConfig
from xlstm_jax.data.mixture import Mixture, Schedule
from xlstm_jax.data.order import Order
from xlstm_jax.data.prefetch import BatchIterator, by_step
from xlstm_jax.errors import ConfigError, quote


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """The batches of a data set by step.

    Raises:
        ConfigError: a batch is larger than the data.
    """

    examples: Examples
    cfg: DataConfig
    sizes: BatchSizes
    # (step, end): from `step` on, the sequences of the steps from `step` to `end` are left out.
    skips: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        # A batch may continue into one more epoch, not into several.
        if self.cfg.batch_size > len(self.examples):
            source = quote(self.cfg.sources or self.cfg.source)
            raise ConfigError(
                f"data.batch_size={self.cfg.batch_size} must be at most the {len(self.examples)} "
                f"windows of data.source={source}; make the batch or data.seq_len smaller, or add "
                "text."
            )
        if self.cfg.packing == "stream" and self.sizes.ramp:
            raise ConfigError(
                "train.batch_ramp must be empty with data.packing='stream', whose sequences "
                "continue from step to step; use another packing."
            )

    def index(self, step: int, block: range) -> Int64[np.ndarray, "B"]:
        """The windows of a block of the sequences of a step."""
        # int64: the stream outgrows 32 bits.
        within = np.arange(block.start, block.stop, dtype=np.int64)
        if self.cfg.packing == "stream":
            # Windows of one long sequence; up to batch_size - 1 windows at the end are not used.
            length = len(self.examples) // self.cfg.batch_size
            return within * length + self._start(step) // self.cfg.batch_size % length
        sequence = self._start(step) + within
        if not isinstance(self.examples, Mixture):
            return self._order(self.examples, self.cfg.seed).window(sequence)
        source, rank = self._schedule.draw(sequence)
        index = np.empty_like(rank)
        for number, examples in enumerate(self.examples.sources.values()):
            mine = source == number
            order = self._order(examples, self.cfg.seed, number)
            index[mine] = order.window(rank[mine]) + self.examples.offsets[number]
        return index

    def batch(self, step: int, *, host_index: int = 0, host_count: int = 1) -> Batch:
        """The batch of a step; with several hosts, this host's block of it.

        Raises:
            ConfigError: hosts cannot share it evenly.
        """
        if step < 0:
            raise ConfigError(
                f"step must be at least 0, got {step}; 0 is the first batch of a run."
            )
        return self.examples.batch(
            self.index(step, _host_block(self.sizes.at(step), host_index, host_count))
        )

    def dataset(self, *, host_index: int = 0, host_count: int = 1) -> Any:
        """The batches as a `grain.MapDataset`: element `step` is the batch of that step."""
        make = functools.partial(self.batch, host_index=host_index, host_count=host_count)
        make(0)  # invalid arguments raise here, and not in a worker
        return by_step(make)

    def batches(
        self,
        start_step: int = 0,
        num_steps: int | None = None,
        *,
        host_index: int = 0,
        host_count: int = 1,
    ) -> BatchIterator:
        """The batches from a step on, prefetched; see `loader.batches`."""
        dataset = self.dataset(host_index=host_index, host_count=host_count)
        return BatchIterator(dataset, start_step, num_steps, self.cfg.workers)

    @property
    def description(self) -> dict[str, Any]:
        """The description of the examples."""
        return self.examples.description

    def index_of(self, step: int) -> list[int]:
        """The windows of a step."""
        return self.index(step, range(self.sizes.at(step))).tolist()

    def skip(self, skips: Iterable[tuple[int, int]]) -> "Stream":
        """The same batches with other `skips`."""
        return dataclasses.replace(self, skips=tuple(skips))

    def _start(self, step: int) -> int:
        """The first sequence of a step."""
        before = self.sizes.before
        skipped = sum(before(end) - before(start) for start, end in self.skips if start <= step)
        return before(step) + skipped

    def _order(self, examples: Examples, *seeds: int) -> Order:
        cfg, shuffle = self.cfg, self.cfg.shuffle if examples.shuffle else "none"
        return Order(len(examples), seeds, shuffle, cfg.shuffle_block, cfg.shuffle_set)

    @functools.cached_property
    def _schedule(self) -> Schedule:
        cfg = self.cfg
        phases = [(0, cfg.weights), *cfg.weight_schedule]
        weights = tuple(tuple(table[name] for name in cfg.sources) for _, table in phases)
        starts = tuple(self.sizes.before(step) for step, _ in phases)
        return Schedule(weights, starts, cfg.seed)

    def counts(self, step: int) -> dict[str, int]:
        """`sequences_NAME` of every source of a mixture, up to a step, with `skips`; else {}."""
        if not isinstance(self.examples, Mixture):
            return {}
        counts = self._schedule.counts(self._start(step))
        names = [f"sequences_{name}" for name in self.examples.sources]
        return dict(zip(names, counts, strict=True))


def _host_block(batch_size: int, host_index: int, host_count: int) -> range:
    """The block of a global batch that one host loads; all blocks in order are the batch."""
    if host_count < 1 or batch_size % host_count:
        raise ConfigError(
            f"data.batch_size={batch_size} must be a multiple of host_count={host_count}, as "
            "every host loads the same number of sequences; change one of them."
        )
    if not 0 <= host_index < host_count:
        raise ConfigError(
            f"host_index must be in 0..{host_count - 1} for host_count={host_count}, got "
            f"{host_index}; pass the id of this process."
        )
    share = batch_size // host_count
    return range(host_index * share, (host_index + 1) * share)
