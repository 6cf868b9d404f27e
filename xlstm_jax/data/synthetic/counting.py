"""Majority and majority count: the most frequent symbol, and how often it occurs.

All ids but that of padding are symbols, and id c is the count c. Ties go to the smallest id. Counts
are capped at the largest id.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1, which does not settle ties.
"""

import numpy as np
from jaxtyping import Int, Int64, UInt64

from xlstm_jax.data.synthetic.draws import one_answer, symbols_before_last
from xlstm_jax.data.synthetic.tasks import PAD, Option, Options, Sequences, SyntheticTask


def most_frequent(
    question: Int[np.ndarray, "N T"],
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """The most frequent symbol of each sample, and its count; padding is ignored."""
    ordered = np.sort(question, axis=1)
    position = np.arange(ordered.shape[1])
    starts = np.ones_like(ordered, bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.maximum.accumulate(np.where(starts, position, 0), axis=1)
    # Occurrences so far of the symbol at each position. Memory does not depend on the vocabulary.
    counts = np.where(ordered == PAD, 0, position - first + 1)
    best = np.argmax(counts, axis=1)  # the first maximum: the smallest id
    samples = np.arange(len(ordered))
    return ordered[samples, best], counts[samples, best]


def majority(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Random symbols and the most frequent one."""
    question = symbols_before_last(keys, lengths, padded_len, opts["vocab_size"] - 1)
    return one_answer(question, lengths, most_frequent(question)[0])


def majority_count(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Random symbols and the count of the most frequent one."""
    question = symbols_before_last(keys, lengths, padded_len, opts["vocab_size"] - 1)
    count = np.minimum(most_frequent(question)[1], opts["vocab_size"] - 1)
    return one_answer(question, lengths, count)


MAJORITY = SyntheticTask(
    name="majority",
    category="counting",
    options={"vocab_size": Option(64, 3)},
    generate=majority,
    chance=lambda opts: 1 / (opts["vocab_size"] - 1),
)
MAJORITY_COUNT = SyntheticTask(
    name="majority_count",
    category="counting",
    options={"vocab_size": Option(64, 3)},
    generate=majority_count,
    chance=lambda opts: 1 / (opts["vocab_size"] - 1),
)
