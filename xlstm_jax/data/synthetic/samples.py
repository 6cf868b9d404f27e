"""Question-and-answer tasks as data sets: sample i is a function of (seed, split, i) only.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1. A sample is padded on the right with
`PAD` to L tokens. Its length, with the answer, is uniform in [min_len, max_len]. The answer is
replaced by `PAD` in the inputs, so the model never reads it.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from xlstm_jax.data import hashing
from xlstm_jax.data.batch import Batch
from xlstm_jax.data.config import SPLITS, DataConfig, Split
from xlstm_jax.data.synthetic.tasks import PAD, SyntheticTask
from xlstm_jax.errors import ConfigError

IGNORED = -1  # the target at positions without an answer
_ENDLESS = 1 << 40  # samples in an epoch: training never repeats one


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples 0, 1, 2, ... of a task: endless for training, `num_eval_samples` of other splits.

    Raises:
        ConfigError: an option of the task is invalid; the range of lengths is empty, exceeds
            `seq_len` + 1 tokens or has lengths that cannot hold the task.
    """

    task: SyntheticTask
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
        self.task.check_min_len(least, self.options)

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """The options of the task, with defaults."""
        return self.task.complete(self.cfg.task)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, padding included."""
        return self.task.vocab_size(self.options)

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
            **({"task": self.options} if self.cfg.task else {}),
        }

    def __len__(self) -> int:
        """Number of samples in an epoch."""
        return _ENDLESS if self.split == "train" else self.cfg.num_eval_samples

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The samples with these indices."""
        keys = sample_keys(self.cfg.seed, self.split, index)
        tokens, answers, lengths = self.task.generate(
            keys, self._draw_lengths(keys), self.cfg.seq_len + 1, self.options
        )
        return shift_targets(tokens, answers, lengths, index)

    def _draw_lengths(self, keys: UInt64[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
        """The most tokens of each sample, uniform between the two bounds."""
        least, most, step = self.cfg.min_len, self._max_len, 1
        if self.task.odd_lengths:
            # An even bound is lowered by one, so both ranges of [3, 40] and [40, 256] have a 39.
            least, most, step = (least + 1) // 2 * 2 - 1, (most + 1) // 2 * 2 - 1, 2
        return least + step * hashing.below(keys, (most - least) // step + 1)


def sample_keys(seed: int, split: Split, index: Int64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
    """The keys of the samples with these indices."""
    # Splits have different keys, so that validation samples differ from those of training.
    return hashing.fold(hashing.key(seed, SPLITS.index(split)), index.astype(np.uint64))


def scaled_accuracy(accuracy: Any, chance: float) -> Any:
    """0 for guessing and 1 for perfect answers; negative below chance."""
    return (accuracy - chance) / (1 - chance)


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
