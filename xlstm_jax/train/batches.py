"""Where the batches of a run come from: its config, or the caller of `fit`."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from xlstm_jax.config import ConfigError
from xlstm_jax.data.batch import Batch
from xlstm_jax.data.prefetch import BatchIterator, by_step
from xlstm_jax.errors import quote
from xlstm_jax.train.config import ExperimentConfig


@runtime_checkable  # so that signatures can be checked at run time
class TrainBatches(Protocol):
    """The training batches of a run: `data.stream.Stream`, or `GivenBatches`."""

    @property
    def description(self) -> dict[str, Any]:
        """What identifies the data, as JSON values."""

    def batches(
        self, start_step: int, num_steps: int, *, host_index: int, host_count: int
    ) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """This host's blocks of the batches from a step on."""

    def index_of(self, step: int) -> list[int] | None:
        """The windows of a step; None if unknown."""

    def batch(self, step: int) -> Batch | None:
        """The global batch of a step; None if it can be read only once."""

    def skip(self, skips: Iterable[tuple[int, int]]) -> "TrainBatches":
        """Without the data of the steps from `step` to `end`, from `step` on; see `Stream`."""

    def counts(self, step: int) -> dict[str, int]:
        """More values for the record of a step."""


class GivenBatches:
    """Batches that the caller of `fit` made: a `grain.MapDataset` or an iterable.

    A map is indexed by the step. An iterable is read from step 0 on, so a resumed run reads, and
    drops, the batches of the steps before.
    """

    def __init__(self, data: Any, cfg: ExperimentConfig, skips: Iterable[tuple[int, int]] = ()):
        import grain  # takes half a second

        is_map, self._skips = isinstance(data, grain.MapDataset), tuple(skips)
        stop = self._position(cfg.train.steps)
        if is_map and len(data) < stop:
            steps = cfg.train.steps
            raise ConfigError(
                f"data must have a batch for each of train.steps={steps}"
                f"{_and_skipped(stop - steps)}, got {len(data)}; repeat it, or lower train.steps."
            )
        if not is_map and not isinstance(data, Iterable):
            raise ConfigError(
                "data must be a grain.MapDataset or an iterable of xlstm_jax.data.Batch, got "
                f"{quote(type(data))}; None reads the data of the config."
            )
        if cfg.train.spike_rewinds and isinstance(data, Iterator):
            raise ConfigError(
                f"train.spike_rewinds={cfg.train.spike_rewinds} must be 0 with data that can be "
                f"read only once, got {quote(type(data))}; pass a grain.MapDataset or a list."
            )
        self._data: Any = data
        self._is_map, self._cfg = is_map, cfg

    @property
    def description(self) -> dict[str, Any]:
        """Records that the caller of `fit` passed the data."""
        return {"source": "argument data of fit"}

    def batches(
        self, start_step: int, num_steps: int, *, host_index: int, host_count: int
    ) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """This host's blocks of the batches from a step on; those of a map are prefetched."""

        def block(batch: Any, step: int) -> Batch:
            batch = self._checked(batch, step)
            share = len(batch.index) // host_count
            return Batch(*(x[host_index * share :][:share] for x in batch))

        if self._is_map:
            dataset = by_step(lambda step: block(self._data[self._position(step)], step))
            return BatchIterator(dataset, start_step, num_steps)
        return contextlib.nullcontext(self._read(start_step, start_step + num_steps, block))

    def _position(self, step: int) -> int:
        """The number in `data` of the batch of a step."""
        return step + sum(end - start for start, end in self._skips if start <= step)

    def _read(self, start: int, stop: int, block: Callable[[Any, int], Batch]) -> Iterator[Batch]:
        """The batches of an iterable."""
        # All skips are before `start`: a run rewinds to the step of its last skip.
        first, last, number = self._position(start), self._position(stop), -1
        for number, batch in zip(range(last), self._data, strict=False):
            if number >= first:
                yield block(batch, number - first + start)
        if number + 1 < last:
            raise ConfigError(
                f"data must have a batch for each of train.steps={stop}"
                f"{_and_skipped(last - stop)}, but it ends after {number + 1}; repeat it, or lower "
                "train.steps."
            )

    def _checked(self, batch: Any, step: int) -> Batch:
        """The batch as NumPy arrays; raises ConfigError unless it fits the config."""
        shape = self._cfg.batch_sizes.at(step), self._cfg.data.seq_len
        expected = [(np.int32, shape)] * 3 + [(np.float32, shape), (np.int64, shape[:1])]
        if not isinstance(batch, Batch):
            raise ConfigError(
                f"data must have elements of the type xlstm_jax.data.Batch, got "
                f"{quote(type(batch))} at step {step}; convert them."
            )
        arrays = []
        for name, leaf, (dtype, size) in zip(Batch._fields, batch, expected, strict=True):
            leaf = np.asarray(leaf)
            if leaf.shape != size or not np.can_cast(leaf.dtype, dtype, "same_kind"):
                raise ConfigError(
                    f"{name} of the batch at step {step} must be {np.dtype(dtype)} of shape "
                    f"{size}, got {leaf.dtype} of shape {leaf.shape}; change the batch, or "
                    "data.batch_size and data.seq_len."
                )
            arrays.append(leaf.astype(dtype, copy=False))
        tokens, vocab_size = arrays[0], self._cfg.model.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ConfigError(
                f"inputs of the batch at step {step} must be below {vocab_size}, the vocabulary of "
                f"the model, got {tokens.min()} to {tokens.max()}; use the tokenizer of the model."
            )
        return Batch(*arrays)

    def index_of(self, step: int) -> None:
        """None: batches of the caller have no windows."""

    def batch(self, step: int) -> Batch | None:
        """The batch of a step; None if the data can be read only once."""
        if isinstance(self._data, Iterator):
            return None
        position = self._position(step)
        if self._is_map:
            return self._checked(self._data[position], step)
        return self._checked(next(itertools.islice(self._data, position, None)), step)

    def skip(self, skips: Iterable[tuple[int, int]]) -> "GivenBatches":
        """The same batches without the skipped ones."""
        return GivenBatches(self._data, self._cfg, skips)

    def counts(self, step: int) -> dict[str, int]:
        """No further counts."""
        return {}


def _and_skipped(count: int) -> str:
    return f" and {count} skipped ones" if count else ""
