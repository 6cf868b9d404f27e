"""Parity: whether the number of b's is odd. The state is one bit, which every b flips.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1; token ids and layout as in the reference
scripts. Token 0 is padding, a is 1, b is 2. With a larger vocabulary the symbols are the residues
modulo vocab_size - 1, and the answer is their sum.
"""

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from xlstm_jax.data import hashing
from xlstm_jax.data.synthetic.samples import PAD

VOCAB_SIZE = 3


def answer(question: Int[np.ndarray, "N T"], vocab_size: int = VOCAB_SIZE) -> Int[np.ndarray, "N"]:
    """The token id of the answer; padding in the question is ignored."""
    # Padding and the residue 0 both become 0, so neither changes the sum.
    residues = np.maximum(question - 1, 0)
    return 1 + residues.sum(axis=-1) % (vocab_size - 1)


def task(
    keys: UInt64[np.ndarray, "N"],
    lengths: Int64[np.ndarray, "N"],
    padded_len: int,
    vocab_size: int = VOCAB_SIZE,
) -> tuple[Int[np.ndarray, "N L"], Bool[np.ndarray, "N L"]]:
    """Random symbols followed by their answer; a `Task`."""
    position = np.arange(padded_len)
    # Keys by position: a longer padding does not change the symbols.
    symbol_keys = hashing.fold(keys[:, None], position.astype(np.uint64)[None])
    symbols = 1 + hashing.below(symbol_keys, vocab_size - 1)
    last = lengths[:, None] - 1
    tokens = np.where(position < last, symbols, PAD)
    is_answer = position == last
    return np.where(is_answer, answer(tokens, vocab_size)[:, None], tokens), is_answer
