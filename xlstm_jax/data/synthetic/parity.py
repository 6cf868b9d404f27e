"""Parity: is the number of b odd? One bit of memory, and every symbol can flip it.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1; ids and framing as in the reference
scripts. Token 0 is padding, a is 1, b is 2. With a larger vocabulary the symbols are the residues
of V - 1, and the answer is their sum.
"""

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from xlstm_jax.data import hashing
from xlstm_jax.data.synthetic.samples import PAD

VOCAB_SIZE = 3


def answer(question: Int[np.ndarray, "N T"], vocab_size: int = VOCAB_SIZE) -> Int[np.ndarray, "N"]:
    """The answer's id; padding in the question does not count."""
    residues = np.maximum(question - 1, 0)
    return 1 + residues.sum(axis=-1) % (vocab_size - 1)


def task(
    keys: UInt64[np.ndarray, "N"],
    lengths: Int64[np.ndarray, "N"],
    row_len: int,
    vocab_size: int = VOCAB_SIZE,
) -> tuple[Int[np.ndarray, "N L"], Bool[np.ndarray, "N L"]]:
    """Random symbols and their answer, as `Samples` asks for them."""
    position = np.arange(row_len)
    symbol_keys = hashing.fold(keys[:, None], position.astype(np.uint64)[None])
    symbols = 1 + hashing.below(symbol_keys, vocab_size - 1)
    last = lengths[:, None] - 1
    tokens = np.where(position < last, symbols, PAD)
    is_answer = position == last
    return np.where(is_answer, answer(tokens, vocab_size)[:, None], tokens), is_answer
