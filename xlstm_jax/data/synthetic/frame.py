"""The frame every question-and-answer task shares: lengths, keys, and rows to a batch.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1. A row holds a sample at its left and
`PAD` to its right; `n`, its number of tokens with the answer, is uniform in [min_len, max_len].
The model reads the row with the answer blanked out, so an answer is never fed in.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from xlstm_jax.config import ConfigError
from xlstm_jax.data import hashing
from xlstm_jax.data.batch import Batch
from xlstm_jax.data.config import SPLITS, Split

PAD = 0
IGNORED = -1  # the target where nothing is asked


class Draws(NamedTuple):
    """What is random in a set of samples."""

    lengths: Int64[np.ndarray, "N"]  # n, answer included
    keys: UInt64[np.ndarray, "N"]  # one per sample; positions are folded in by the task


def draw(
    index: Int64[np.ndarray, "N"], *, seed: int, split: Split, min_len: int, max_len: int
) -> Draws:
    """Lengths and keys of the samples with these numbers."""
    keys = hashing.fold(hashing.key(seed, SPLITS.index(split)), index.astype(np.uint64))
    lengths = min_len + hashing.below(keys, max_len - min_len + 1)
    return Draws(lengths, keys)


def frame(
    rows: Int[np.ndarray, "N L"],
    answers: Bool[np.ndarray, "N L"],
    lengths: Int64[np.ndarray, "N"],
    index: Int64[np.ndarray, "N"],
) -> Batch:
    """Rows of L tokens to a batch of T = L - 1 positions, the answers asked for one step early.

    The answer at position p is the target at position p - 1, so a single answer is read off at the
    last token of its question. Positions that come after the last one asked are padding.
    """
    inputs = np.where(answers, PAD, rows)[:, :-1]
    targets = np.where(answers, rows, IGNORED)[:, 1:]
    inside = np.arange(inputs.shape[1]) < lengths[:, None] - 1
    return Batch(
        inputs=inputs.astype(np.int32),
        targets=targets.astype(np.int32),
        segment_ids=inside.astype(np.int32),
        weights=answers[:, 1:].astype(np.float32),
        index=index,
    )


def check_lengths(min_len: int, max_len: int, row_len: int) -> None:
    """That samples of these lengths exist and fit a row.

    Raises:
        ConfigError: they do not.
    """
    if min_len < 2:
        raise ConfigError(
            f"min_len must be at least 2, a question and its answer, got {min_len}; "
            "leave it out for the default of 3."
        )
    if max_len < min_len:
        raise ConfigError(
            f"max_len must be at least min_len={min_len}, got {max_len}; raise max_len (or "
            "data.seq_len, where max_len is left to it) or lower min_len."
        )
    if max_len > row_len:
        raise ConfigError(
            f"max_len must be at most the row's {row_len} tokens (data.seq_len + 1), "
            f"got {max_len}; make the rows longer or the samples shorter."
        )
