"""Tasks whose answer rearranges the symbols of a word w of m symbols, which are uniform.

| task | sample | special id |
|---|---|---|
| reverse string | w, ACT, w reversed | ACT is 1 |
| repetition | w, ACT, w | ACT is 1 |
| odds first | w, ACT, its 1st, 3rd, 5th, ... symbols, then its 2nd, 4th, 6th, ... | ACT is 1 |
| set | w, ACT, the distinct symbols of w by first appearance | ACT is 1 |
| bucket sort | w, w in ascending order | none |
| missing duplicate | w, w with one of its symbols replaced by MIS, that symbol | MIS is 1 |

The number of tokens of a sample, answer included, is drawn; m is the largest one that fits, so that
the sample may be one token shorter. Arrays of symbols are zero-based here.

Sources: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1; Delétang et al. 2023, arXiv:2207.02098.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, UInt64

from xlstm_jax.data.synthetic.draws import draw, draw_one, take
from xlstm_jax.data.synthetic.tasks import PAD, Option, Options, Sequences, SyntheticTask

ACT = MIS = 1
_WORD, _MISSING = 0, 1  # streams of random numbers


def _words_and_rest(keys, lengths, padded_len, opts):
    """Words after which ACT and as many answers fit; their lengths; positions after ACT."""
    m = (lengths - 1) // 2
    words = 2 + draw(keys, padded_len, opts["vocab_size"] - 2, _WORD)
    return words, m[:, None], np.arange(padded_len) - m[:, None] - 1


def _with_answer(words, m, rest, answer, answer_len) -> Sequences:
    """Words, ACT, and the answer, an array of L whose column at `rest` is the one to write."""
    is_answer = (rest >= 0) & (rest < answer_len)
    tokens = np.select([rest < -1, rest == -1, is_answer], [words, ACT, answer], PAD)
    return Sequences(tokens, is_answer, (m + 1 + answer_len)[:, 0])


def _rearranged(
    position_of: Callable[[Int64[np.ndarray, "N L"], Int64[np.ndarray, "N 1"]], np.ndarray],
):
    """The generator of a task whose answer is w[position_of(i, m)] at i = 0 ... m - 1."""

    def generate(
        keys: UInt64[np.ndarray, "N"],
        lengths: Int64[np.ndarray, "N"],
        padded_len: int,
        opts: Options,
    ) -> Sequences:
        words, m, rest = _words_and_rest(keys, lengths, padded_len, opts)
        return _with_answer(words, m, rest, take(words, position_of(rest, m)), m)

    return generate


def _odds_first(i, m):
    num_odd = (m + 1) // 2  # symbols at odd one-based positions
    return np.where(i < num_odd, 2 * i, 2 * (i - num_odd) + 1)


def distinct(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Words and their distinct symbols, in the order of first appearance."""
    words = 2 + draw(keys, padded_len, opts["vocab_size"] - 2, _WORD)
    is_new = first_appearances(words)
    total = np.arange(2, padded_len + 2) + is_new.cumsum(axis=1)  # tokens of the sample, by m
    m = (total <= lengths[:, None]).sum(axis=1, keepdims=True)
    is_new &= np.arange(padded_len) < m
    # A stable sort moves the new symbols to the front, in their order.
    symbols = np.take_along_axis(words, np.argsort(~is_new, axis=1, kind="stable"), axis=1)
    rest = np.arange(padded_len) - m - 1
    answer_len = is_new.sum(axis=1, keepdims=True)
    return _with_answer(words, m, rest, take(symbols, rest), answer_len)


def first_appearances(words: Int64[np.ndarray, "N T"]) -> np.ndarray:
    """Whether no earlier position of the sample has the same symbol."""
    order = np.argsort(words, axis=1, kind="stable")
    ordered = np.take_along_axis(words, order, axis=1)
    is_new = np.ones_like(words, bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    result = np.empty_like(is_new)
    np.put_along_axis(result, order, is_new, axis=1)
    return result


def bucket_sort(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Words and their sorted symbols."""
    position, m = np.arange(padded_len), (lengths // 2)[:, None]
    words = 1 + draw(keys, padded_len, opts["vocab_size"] - 1, _WORD)
    # Other positions sort after all symbols.
    ordered = np.sort(np.where(position < m, words, opts["vocab_size"]), axis=1)
    is_answer = (position >= m) & (position < 2 * m)
    answer = take(ordered, position - m)
    tokens = np.select([position < m, is_answer], [words, answer], PAD)
    return Sequences(tokens, is_answer, 2 * m[:, 0])


def missing_duplicate(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Words, their incomplete copies, and the missing symbols."""
    m = (lengths - 1) // 2
    words = 2 + draw(keys, padded_len, opts["vocab_size"] - 2, _WORD)
    missing = draw_one(keys, m, _MISSING)
    position, m = np.arange(padded_len), m[:, None]
    copy = np.where(position - m == missing[:, None], MIS, take(words, position - m))
    is_answer = position == 2 * m
    answer = take(words, missing[:, None])
    tokens = np.select([position < m, position < 2 * m, is_answer], [words, copy, answer], PAD)
    return Sequences(tokens, is_answer, 2 * m[:, 0] + 1)


def _task(name: str, category: str, generate, vocab_size: int, num_special: int, min_len=3):
    return SyntheticTask(
        name=name,
        category=category,
        options={"vocab_size": Option(vocab_size, num_special + 2)},
        generate=generate,
        chance=lambda opts: 1 / (opts["vocab_size"] - num_special),
        min_len=lambda opts: min_len,
    )


REVERSE_STRING = _task(
    "reverse_string", "deterministic context-free", _rearranged(lambda i, m: m - 1 - i), 12, 2
)
BUCKET_SORT = _task("bucket_sort", "context-sensitive", bucket_sort, 11, 1, min_len=2)
MISSING_DUPLICATE = _task("missing_duplicate", "context-sensitive", missing_duplicate, 11, 2)
ODDS_FIRST = _task("odds_first", "context-sensitive", _rearranged(_odds_first), 12, 2)
REPETITION = _task("repetition", "memory", _rearranged(lambda i, m: i), 12, 2)
SET = _task("set", "memory", distinct, 128, 2)
