"""Parity: is the number of b odd? One bit of memory, and every symbol can flip it.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1; ids and framing as in the reference
scripts. Token 0 is padding, a is 1, b is 2. With a larger vocabulary the symbols are the residues
of V - 1, and the answer is their sum.
"""

import numpy as np
from jaxtyping import Int, Int64

from xlstm_jax.data import hashing
from xlstm_jax.data.batch import Batch
from xlstm_jax.data.config import Split
from xlstm_jax.data.synthetic import frame

VOCAB_SIZE = 3


def answer(question: Int[np.ndarray, "N T"], vocab_size: int = VOCAB_SIZE) -> Int[np.ndarray, "N"]:
    """The answer's id; padding in the question does not count."""
    residues = np.maximum(question - 1, 0)
    return 1 + residues.sum(axis=-1) % (vocab_size - 1)


def samples_at(
    index: Int64[np.ndarray, "N"],
    *,
    seed: int,
    split: Split,
    min_len: int,
    max_len: int,
    row_len: int,
    vocab_size: int = VOCAB_SIZE,
) -> Batch:
    """The samples with these numbers, each a function of (seed, split, its number) alone.

    Args:
        seed: of the data, not of the model.
        min_len, max_len: bounds of n, the tokens of a sample with its answer, both included.
        row_len: tokens of a row, L; the batch has T = L - 1 positions.

    Raises:
        ConfigError: no such samples exist, or they do not fit the row.
    """
    frame.check_lengths(min_len, max_len, row_len)
    lengths, keys = frame.draw(index, seed=seed, split=split, min_len=min_len, max_len=max_len)
    position = np.arange(row_len)
    symbol_keys = hashing.fold(keys[:, None], position.astype(np.uint64)[None])
    symbols = 1 + hashing.below(symbol_keys, vocab_size - 1)
    last = lengths[:, None] - 1
    rows = np.where(position < last, symbols, frame.PAD)
    is_answer = position == last
    rows = np.where(is_answer, answer(rows, vocab_size)[:, None], rows)
    return frame.frame(rows, is_answer, lengths, index)


def samples(
    seed: int,
    split: Split,
    start: int,
    count: int,
    min_len: int,
    max_len: int,
    row_len: int,
    vocab_size: int = VOCAB_SIZE,
) -> Batch:
    """Samples start .. start + count - 1 as one batch [count, row_len - 1]: see `samples_at`."""
    return samples_at(
        np.arange(start, start + count, dtype=np.int64),
        seed=seed,
        split=split,
        min_len=min_len,
        max_len=max_len,
        row_len=row_len,
        vocab_size=vocab_size,
    )
