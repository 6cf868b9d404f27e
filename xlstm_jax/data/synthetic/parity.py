"""Parity: whether the number of b's is odd. The state is one bit, which every b flips.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1; token ids and layout as in the reference
scripts. Token 0 is padding, a is 1, b is 2. With a larger vocabulary the symbols are the residues
modulo vocab_size - 1, and the answer is their sum.
"""

import numpy as np
from jaxtyping import Int, Int64, UInt64

from xlstm_jax.data.synthetic.draws import one_answer, symbols_before_last
from xlstm_jax.data.synthetic.tasks import Option, Options, Sequences, SyntheticTask

VOCAB_SIZE = 3


def answer(question: Int[np.ndarray, "N T"], vocab_size: int = VOCAB_SIZE) -> Int[np.ndarray, "N"]:
    """The token id of the answer; padding in the question is ignored."""
    # Padding and the residue 0 both become 0, so neither changes the sum.
    residues = np.maximum(question - 1, 0)
    return 1 + residues.sum(axis=-1) % (vocab_size - 1)


def generate(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Random symbols followed by their answer."""
    vocab_size = opts["vocab_size"]
    question = symbols_before_last(keys, lengths, padded_len, vocab_size - 1)
    return one_answer(question, lengths, answer(question, vocab_size))


TASK = SyntheticTask(
    name="parity",
    category="regular",
    options={"vocab_size": Option(VOCAB_SIZE, 3)},
    generate=generate,
    chance=lambda opts: 1 / (opts["vocab_size"] - 1),
)
