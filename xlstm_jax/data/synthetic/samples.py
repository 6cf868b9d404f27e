"""Question-and-answer tasks as data sets: sample i is a function of (seed, split, i) alone.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1. A sample stands at the left of L
tokens, `PAD` to its right; its number of tokens with the answer is uniform in [min_len, max_len].
The model reads it with the answer blanked out, so an answer is never fed in.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from xlstm_jax.config import ConfigError
from xlstm_jax.data import hashing
from xlstm_jax.data.batch import Batch
from xlstm_jax.data.config import SPLITS, DataConfig, Split

PAD = 0
IGNORED = -1  # the target where nothing is asked
_ENDLESS = 1 << 40  # training never sees a sample twice

Task = Callable[
    [UInt64[np.ndarray, "N"], Int64[np.ndarray, "N"], int],
    tuple[Int[np.ndarray, "N L"], Bool[np.ndarray, "N L"]],
]
"""(one key per sample, lengths with the answer, L) -> tokens, and which of them are answers."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples 0, 1, 2, ... of a task: endless in training, a fixed number held out.

    Raises:
        ConfigError: no samples of these lengths exist, or they do not fit `seq_len` + 1 tokens.
    """

    task: Task
    vocab_size: int
    cfg: DataConfig
    split: Split

    # The samples are independent of each other, so any order is as good as theirs.
    shuffle = False

    def __post_init__(self):
        least, most, row_len = self.cfg.min_len, self._max_len, self.cfg.seq_len + 1
        if most < least:
            raise ConfigError(
                f"max_len must be at least min_len={least}, got {most}; raise max_len (or "
                "data.seq_len, where max_len is left to it) or lower min_len."
            )
        if most > row_len:
            raise ConfigError(
                f"max_len must be at most the row's {row_len} tokens (data.seq_len + 1), "
                f"got {most}; make the rows longer or the samples shorter."
            )

    @property
    def _max_len(self) -> int:
        return self.cfg.seq_len + 1 if self.cfg.max_len is None else self.cfg.max_len

    @property
    def description(self) -> dict[str, Any]:
        """What the samples are a function of."""
        return {
            "source": self.cfg.source,
            "seed": self.cfg.seed,
            "split": self.split,
            "min_len": self.cfg.min_len,
            "max_len": self._max_len,
            "row_len": self.cfg.seq_len + 1,
        }

    def __len__(self) -> int:
        """Samples in an epoch."""
        return _ENDLESS if self.split == "train" else self.cfg.num_eval_samples

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The samples with these numbers."""
        key = hashing.key(self.cfg.seed, SPLITS.index(self.split))
        keys = hashing.fold(key, index.astype(np.uint64))
        lengths = self.cfg.min_len + hashing.below(keys, self._max_len - self.cfg.min_len + 1)
        return frame(*self.task(keys, lengths, self.cfg.seq_len + 1), lengths, index)


def frame(
    tokens: Int[np.ndarray, "B L"],
    answers: Bool[np.ndarray, "B L"],
    lengths: Int64[np.ndarray, "B"],
    index: Int64[np.ndarray, "B"],
) -> Batch:
    """L tokens to T = L - 1 positions, the answers asked for one step early.

    The answer at position p is the target at position p - 1, so a single answer is read off at the
    last token of its question. Positions that come after the last one asked are padding.
    """
    inside = np.arange(tokens.shape[1] - 1) < lengths[:, None] - 1
    return Batch(
        inputs=np.where(answers, PAD, tokens)[:, :-1].astype(np.int32),
        targets=np.where(answers, tokens, IGNORED)[:, 1:].astype(np.int32),
        segment_ids=inside.astype(np.int32),
        weights=answers[:, 1:].astype(np.float32),
        index=index,
    )
