"""Question-and-answer tasks as data sets: sample i is a function of (seed, split, i) alone.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1. A sample is padded on the right with
`PAD` to L tokens. Its length, with the answer, is uniform in [min_len, max_len]. The answer is
replaced by `PAD` in the inputs, so the model never reads it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from xlstm_jax.data import hashing
from xlstm_jax.data.batch import Batch
from xlstm_jax.data.config import SPLITS, DataConfig, Split
from xlstm_jax.errors import ConfigError

PAD = 0
IGNORED = -1  # the target at positions without an answer
_ENDLESS = 1 << 40  # samples in an epoch: training never repeats one

Task = Callable[
    [UInt64[np.ndarray, "N"], Int64[np.ndarray, "N"], int],
    tuple[Int[np.ndarray, "N L"], Bool[np.ndarray, "N L"]],
]
"""(one key per sample, lengths with the answer, L) -> tokens, and whether each is an answer."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples 0, 1, 2, ... of a task: endless for training, `num_eval_samples` of a held-out split.

    Raises:
        ConfigError: the range of lengths is empty or exceeds `seq_len` + 1 tokens.
    """

    task: Task
    vocab_size: int
    cfg: DataConfig
    split: Split

    # The samples are independent and identically distributed, so shuffling changes nothing.
    shuffle = False

    def __post_init__(self):
        least, most, padded_len = self.cfg.min_len, self._max_len, self.cfg.seq_len + 1
        if most < least:
            raise ConfigError(
                f"max_len must be at least min_len={least}, got {most}; raise max_len (or "
                "data.seq_len, if max_len is None) or lower min_len."
            )
        if most > padded_len:
            raise ConfigError(
                f"max_len must be at most {padded_len} tokens (data.seq_len + 1), "
                f"got {most}; raise data.seq_len or lower max_len."
            )

    @property
    def _max_len(self) -> int:
        return self.cfg.seq_len + 1 if self.cfg.max_len is None else self.cfg.max_len

    @property
    def description(self) -> dict[str, Any]:
        """The values that determine the samples."""
        # Checkpoints store these keys and a resumed run compares them: do not rename them.
        return {
            "source": self.cfg.source,
            "seed": self.cfg.seed,
            "split": self.split,
            "min_len": self.cfg.min_len,
            "max_len": self._max_len,
            "row_len": self.cfg.seq_len + 1,
        }

    def __len__(self) -> int:
        """Number of samples in an epoch."""
        return _ENDLESS if self.split == "train" else self.cfg.num_eval_samples

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The samples with these indices."""
        # Splits have different keys, so held-out samples are not those of training.
        key = hashing.key(self.cfg.seed, SPLITS.index(self.split))
        keys = hashing.fold(key, index.astype(np.uint64))
        lengths = self.cfg.min_len + hashing.below(keys, self._max_len - self.cfg.min_len + 1)
        return shift_targets(*self.task(keys, lengths, self.cfg.seq_len + 1), lengths, index)


def shift_targets(
    tokens: Int[np.ndarray, "B L"],
    answers: Bool[np.ndarray, "B L"],
    lengths: Int64[np.ndarray, "B"],
    index: Int64[np.ndarray, "B"],
) -> Batch:
    """A batch of T = L - 1 positions from L tokens, with targets shifted by one.

    The answer at position p is the target at position p - 1, so a single answer is predicted at the
    last token of its question. Positions after the last target are padding.
    """
    inside = np.arange(tokens.shape[1] - 1) < lengths[:, None] - 1
    return Batch(
        inputs=np.where(answers, PAD, tokens)[:, :-1].astype(np.int32),
        targets=np.where(answers, tokens, IGNORED)[:, 1:].astype(np.int32),
        segment_ids=inside.astype(np.int32),
        weights=answers[:, 1:].astype(np.float32),
        index=index,
    )
