"""A synthetic task behind the interface of a data set."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from xlstm_jax.data.batch import Batch
from xlstm_jax.data.config import DataConfig, Split
from xlstm_jax.data.synthetic import frame

_ENDLESS = 1 << 40  # training never sees a sample twice


@runtime_checkable  # so that signatures can be checked at run time
class Task(Protocol):
    """Samples of a task by number; a module-level function such as `parity.samples_at`."""

    def __call__(
        self,
        index: Int64[np.ndarray, "N"],
        *,
        seed: int,
        split: Split,
        min_len: int,
        max_len: int,
        row_len: int,
    ) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples 0, 1, 2, ... of a task; fresh ones for ever in training, a fixed number held out."""

    task: Task
    vocab_size: int
    cfg: DataConfig
    split: Split

    # The samples are independent of each other, so any order is as good as theirs.
    shuffle = False

    def __post_init__(self):
        frame.check_lengths(self.cfg.min_len, self._max_len, self._row_len)

    @property
    def _row_len(self) -> int:
        return self.cfg.seq_len + 1

    @property
    def _max_len(self) -> int:
        return self._row_len if self.cfg.max_len is None else self.cfg.max_len

    @property
    def description(self) -> dict[str, Any]:
        """What the samples are a function of."""
        return {
            "source": self.cfg.source,
            "seed": self.cfg.seed,
            "split": self.split,
            "min_len": self.cfg.min_len,
            "max_len": self._max_len,
            "row_len": self._row_len,
        }

    def __len__(self) -> int:
        """Samples in an epoch."""
        return _ENDLESS if self.split == "train" else self.cfg.num_eval_samples

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The samples with these numbers."""
        return self.task(
            index,
            seed=self.cfg.seed,
            split=self.split,
            min_len=self.cfg.min_len,
            max_len=self._max_len,
            row_len=self._row_len,
        )
