"""Random symbols by position, and tokens at positions counted from the end of a question."""

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from xlstm_jax.data import hashing
from xlstm_jax.data.synthetic.tasks import PAD, Sequences


def draw(
    keys: UInt64[np.ndarray, "N"], count: int, bound: int, stream: int = 0
) -> Int64[np.ndarray, "N count"]:
    """Integers uniform in [0, bound); those of a position do not depend on `count`.

    Different streams are independent of each other.
    """
    counters = (np.uint64(stream) << np.uint64(32)) + np.arange(count, dtype=np.uint64)
    return hashing.below(hashing.fold(keys[:, None], counters[None]), bound)


def draw_one(
    keys: UInt64[np.ndarray, "N"], bound: Int64[np.ndarray, "N"], stream: int
) -> Int64[np.ndarray, "N"]:
    """One integer for each key, uniform in [0, bound) of its own."""
    counter = np.full(1, stream << 32, np.uint64)
    return hashing.below(hashing.fold(keys, counter), bound)


def take(
    tokens: Int64[np.ndarray, "N T"], position: Int64[np.ndarray, "N L"]
) -> Int64[np.ndarray, "N L"]:
    """The token at each position; positions outside of the array give any token of the sample."""
    return np.take_along_axis(tokens, np.clip(position, 0, tokens.shape[1] - 1), axis=1)


def one_answer(
    question: Int[np.ndarray, "N L"],
    lengths: Int64[np.ndarray, "N"],
    answer: Int[np.ndarray, "N"],
) -> Sequences:
    """Samples whose last token is the answer; `question` has `PAD` from its position on."""
    is_answer: Bool[np.ndarray, "N L"] = np.arange(question.shape[1]) == lengths[:, None] - 1
    return Sequences(np.where(is_answer, answer[:, None], question), is_answer, lengths)


def symbols_before_last(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, bound: int
) -> Int64[np.ndarray, "N L"]:
    """Ids uniform in [1, bound], in all positions but the last one of each sample."""
    inside = np.arange(padded_len) < lengths[:, None] - 1
    return np.where(inside, 1 + draw(keys, padded_len, bound), PAD)
