"""Even pairs, cycle navigation and modular arithmetic without brackets: regular languages.

Source: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1; token ids as in the reference scripts.

- Even pairs: a is 1, b is 2. The answer is a if the number of adjacent unequal symbols is even.
- Cycle navigation: moves on a ring, from position 0: STAY is 1, +1 is 2, -1 is 3, then +2, -2, ...
  up to `max_step`. The ids after those of the moves are the positions; the answer is the last one.
- Modular arithmetic: + is 1, - is 2, * is 3, = is 4, and the ids from 5 on are the digits, which
  are residues. A sample is "d op d op ... d = r"; * precedes + and -.
"""

import numpy as np
from jaxtyping import Int, Int64, UInt64

from xlstm_jax.data.synthetic.draws import draw, one_answer, symbols_before_last
from xlstm_jax.data.synthetic.tasks import PAD, Option, Options, Sequences, SyntheticTask

PLUS, MINUS, TIMES, EQUALS, FIRST_DIGIT = 1, 2, 3, 4, 5
"""Token ids of modular arithmetic."""


def even_pairs_answer(question: Int[np.ndarray, "N T"]) -> Int[np.ndarray, "N"]:
    """1 or 2, whether the number of changes between neighbors is even or odd."""
    # The symbol changes an even number of times exactly if it ends as it began.
    last = np.count_nonzero(question, axis=1) - 1
    return 1 + (question[:, 0] != question[np.arange(len(question)), last])


def even_pairs(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Random symbols, and whether the first equals the last."""
    question = symbols_before_last(keys, lengths, padded_len, 2)
    return one_answer(question, lengths, even_pairs_answer(question))


def cycle_navigation_answer(
    question: Int[np.ndarray, "N T"], vocab_size: int = 9, max_step: int = 1
) -> Int[np.ndarray, "N"]:
    """The id of the last position; padding is ignored."""
    move = np.maximum(question - 1, 0)  # 0: stay or padding; 1, 2, 3, 4: +1, -1, +2, -2
    steps = np.where(move % 2 == 1, (move + 1) // 2, -(move // 2))
    first_position = 2 + 2 * max_step
    return first_position + steps.sum(axis=1) % (vocab_size - first_position)


def cycle_navigation(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Random moves and the position that they lead to."""
    question = symbols_before_last(keys, lengths, padded_len, 1 + 2 * opts["max_step"])
    return one_answer(question, lengths, cycle_navigation_answer(question, **opts))


def arithmetic_answer(
    question: Int[np.ndarray, "N T"], vocab_size: int = 10
) -> Int[np.ndarray, "N"]:
    """The id of the value of "d op d ... d =", modulo the number of digits; padding is ignored."""
    modulus = vocab_size - FIRST_DIGIT
    digits = question[:, 0::2] - FIRST_DIGIT
    total = np.zeros(len(question), question.dtype)
    term = digits[:, 0]  # the product since the last + or -, with its sign
    for i in range(1, digits.shape[1]):
        operator, digit = question[:, 2 * i - 1], digits[:, i]
        is_product, is_end = operator == TIMES, (operator == EQUALS) | (operator == PAD)
        new_term = np.where(operator == MINUS, -digit, digit)
        total = np.where(is_product | is_end, total, total + term)
        term = np.where(is_end, term, np.where(is_product, term * digit % modulus, new_term))
    return FIRST_DIGIT + (total + term) % modulus


def modular_arithmetic(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Random digits and operators, and the value."""
    position, last = np.arange(padded_len), lengths[:, None] - 1
    digits = FIRST_DIGIT + draw(keys, padded_len, opts["vocab_size"] - FIRST_DIGIT)
    operators = 1 + draw(keys, padded_len, 3, stream=1)
    tokens = np.where(position % 2 == 0, digits, operators)
    tokens = np.where(position == last - 1, EQUALS, tokens)
    question = np.where(position < last, tokens, PAD)
    return one_answer(question, lengths, arithmetic_answer(question, opts["vocab_size"]))


EVEN_PAIRS = SyntheticTask(
    name="even_pairs",
    category="regular",
    options={},
    generate=even_pairs,
    chance=lambda opts: 0.5,
    vocab_size=lambda opts: 3,
)
CYCLE_NAVIGATION = SyntheticTask(
    name="cycle_navigation",
    category="regular",
    # At least two positions.
    options={
        "vocab_size": Option(9, lambda opts: 4 + 2 * opts["max_step"]),
        "max_step": Option(1, 1),
    },
    generate=cycle_navigation,
    chance=lambda opts: 1 / (opts["vocab_size"] - 2 - 2 * opts["max_step"]),
)
MODULAR_ARITHMETIC = SyntheticTask(
    name="modular_arithmetic",
    category="regular",
    options={"vocab_size": Option(10, FIRST_DIGIT + 2)},
    generate=modular_arithmetic,
    chance=lambda opts: 1 / (opts["vocab_size"] - FIRST_DIGIT),
    min_len=lambda opts: 3,
    odd_lengths=True,
)
