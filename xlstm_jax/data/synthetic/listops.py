"""ListOps: the value of nested lists of digits, such as `[MAX 4 3 [MIN 2 3 ] 1 0 ]`, which is 4.

Sources: Nangia and Bowman 2018, arXiv:1804.06028; Tay et al. 2020, arXiv:2011.04006 (lengths).
Operators: MAX, MIN, MED (median) and SM (sum modulo 10). The median of an even number of digits is
the integer part of the mean of the two in the middle, so every value is a digit.

The outermost element is a list. An element of a list is again a list with probability `list_share`
unless its depth would exceed `max_depth`, and otherwise a digit; a list has 2 to `max_args`
elements; all choices are uniform. Expressions outside the bounds on the length are drawn again, so
lengths within the bounds have the distribution of this process. As a data set with targets to
predict (`TASK`), a sample has at most the number of tokens that is drawn from data.min_len to
data.max_len.
"""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from xlstm_jax.data import hashing
from xlstm_jax.data.synthetic.tasks import PAD, Option, Options, Sequences, SyntheticTask
from xlstm_jax.errors import ArgumentError, ConfigError, quote

SYMBOLS = (*map(str, range(10)), "[MAX", "[MIN", "[MED", "[SM", "]")
VOCAB_SIZE = 1 + len(SYMBOLS)
NUM_CLASSES = 10
DIGIT = 1  # id of the digit 0
OPERATOR = DIGIT + 10  # id of the first of MAX, MIN, MED, SM
CLOSE = OPERATOR + 4
_IDS = {symbol: DIGIT + n for n, symbol in enumerate(SYMBOLS)}
_MAX, _MIN, _MED, _SUM = range(4)
_OPEN, _WHICH, _COUNT, _DIGIT = range(4)  # streams of random numbers of a position

MIN_ARGS = 2
SHORTEST = 2 + MIN_ARGS  # tokens: operator, elements, bracket
MAX_ATTEMPTS = 5000
"""Draws of a sample after which the bounds on its length are taken for unreachable."""


class Expressions(NamedTuple):
    """Expressions, padded on the right with 0."""

    tokens: Int[np.ndarray, "N L"]
    lengths: Int64[np.ndarray, "N"]  # in tokens
    values: Int64[np.ndarray, "N"]  # 0 to 9


def encode(text: str) -> Int[np.ndarray, "L"]:
    """Token ids of an expression; parentheses, which the published files have, are left out.

    Raises:
        ArgumentError: a symbol is unknown.
    """
    symbols = re.sub("[()]", " ", text).split()
    for symbol in symbols:
        if symbol not in _IDS:
            raise ArgumentError(
                f"a ListOps expression must consist of {' '.join(SYMBOLS)}, got {quote(symbol)}; "
                "separate symbols by spaces."
            )
    return np.array([_IDS[symbol] for symbol in symbols], np.int64)


def expressions(
    keys: UInt64[np.ndarray, "N"],
    min_len: int,
    max_len: int | Int64[np.ndarray, "N"],
    *,
    max_depth: int,
    max_args: int,
    list_share: float = 0.25,
) -> Expressions:
    """One expression of `min_len` to `max_len` tokens per key.

    Args:
        max_len: of all expressions, or of each; determines the padding.
        max_depth: lists within each other, the outermost one included.
        max_args: elements of a list.
        list_share: probability that an element is a list.

    Raises:
        ConfigError: no expression has such a length, or hardly any.
    """
    N, most = len(keys), np.broadcast_to(max_len, len(keys))
    longest = int(most.max(initial=min_len))
    check(min_len, int(most.min(initial=longest)), max_depth, max_args)
    result = Expressions(np.full((N, longest), PAD), *np.zeros((2, N), np.int64))
    pending = np.arange(N)
    for attempt in range(MAX_ATTEMPTS):
        attempt_keys = hashing.fold(keys[pending], np.full(1, attempt, np.uint64))
        drawn, is_complete = _draw(attempt_keys, longest, max_depth, max_args, list_share)
        fits = is_complete & (min_len <= drawn.lengths) & (drawn.lengths <= most[pending])
        for all_samples, leaf in zip(result, drawn, strict=True):
            all_samples[pending[fits]] = leaf[fits]
        pending = pending[~fits]
        if not pending.size:
            return result
    raise ConfigError(
        f"min_len={min_len} and max_len={longest} must be lengths that occur, but none of "
        f"{MAX_ATTEMPTS} draws with max_depth={max_depth} and max_args={max_args} has one; widen "
        "the bounds, or change list_share."
    )


def check(min_len: int, max_len: int, max_depth: int, max_args: int) -> None:
    """Raises ConfigError unless some expression has a length within the bounds."""
    if max_depth < 1 or max_args < MIN_ARGS:
        raise ConfigError(
            f"max_depth must be at least 1 and max_args at least {MIN_ARGS}, got {max_depth} and "
            f"{max_args}; (3, 5) gives short expressions."
        )
    longest = 1
    for _ in range(max_depth):
        longest = 2 + max_args * longest
    if not max(min_len, SHORTEST) <= min(max_len, longest):
        raise ConfigError(
            f"min_len and max_len must overlap {SHORTEST} to {longest}, the lengths of expressions "
            f"with max_depth={max_depth} and max_args={max_args}, got {min_len} and {max_len}; "
            "change the bounds, or max_depth and max_args."
        )


class _Open(NamedTuple):
    """The open lists of every sample, outermost first; A is `max_args`."""

    operator: Int64[np.ndarray, "N depth"]
    wanted: Int64[np.ndarray, "N depth"]  # elements
    filled: Int64[np.ndarray, "N depth"]  # elements so far
    args: Int64[np.ndarray, "N depth A"]  # their values

    def push(self, samples, depth, values) -> None:
        """Appends an element to the innermost open list of some samples."""
        self.args[samples, depth, self.filled[samples, depth]] = values
        self.filled[samples, depth] += 1


def _draw(
    keys: UInt64[np.ndarray, "N"], max_len: int, max_depth: int, max_args: int, list_share: float
) -> tuple[Expressions, Bool[np.ndarray, "N"]]:
    """One draw per key, from left to right, and whether it ends within `max_len` tokens."""
    N = len(keys)
    out = Expressions(np.full((N, max_len), PAD), *np.zeros((2, N), np.int64))
    shape = (N, max_depth)
    operator, wanted, filled = np.zeros((3, *shape), np.int64)
    lists = _Open(operator, wanted, filled, np.zeros((*shape, max_args), np.int64))
    depth = np.zeros(N, np.int64)  # number of open lists
    pending = np.arange(N)  # samples that are not complete
    for t in range(max_len):
        draws = hashing.fold(
            keys[pending, None], np.arange(4 * t, 4 * t + 4, dtype=np.uint64)[None]
        )
        top = depth[pending] - 1
        closes = (top >= 0) & (lists.filled[pending, top] == lists.wanted[pending, top])
        may_open = hashing.uniform(draws[:, _OPEN]) < list_share
        opens = ~closes & (may_open | (top < 0)) & (depth[pending] < max_depth)
        is_digit = ~closes & ~opens

        r, d, draw = pending[opens], depth[pending[opens]], draws[opens]
        lists.operator[r, d] = hashing.below(draw[:, _WHICH], 4)
        lists.wanted[r, d] = MIN_ARGS + hashing.below(draw[:, _COUNT], max_args - MIN_ARGS + 1)
        lists.filled[r, d] = 0
        out.tokens[r, t] = OPERATOR + lists.operator[r, d]
        depth[r] += 1

        r, digits = pending[is_digit], hashing.below(draws[is_digit, _DIGIT], 10)
        out.tokens[r, t] = DIGIT + digits
        lists.push(r, depth[r] - 1, digits)

        r, d = pending[closes], depth[pending[closes]] - 1
        out.tokens[r, t] = CLOSE
        values = _evaluate(lists.operator[r, d], lists.args[r, d], lists.filled[r, d])
        depth[r] -= 1
        is_inner = d > 0
        lists.push(r[is_inner], d[is_inner] - 1, values[is_inner])
        ends = r[~is_inner]
        out.values[ends], out.lengths[ends] = values[~is_inner], t + 1
        pending = np.setdiff1d(pending, ends, assume_unique=True)
        if not pending.size:
            break
    return out, out.lengths > 0


def _evaluate(
    operator: Int64[np.ndarray, "N"], args: Int64[np.ndarray, "N A"], count: Int64[np.ndarray, "N"]
) -> Int64[np.ndarray, "N"]:
    """Values of lists whose first `count` elements are in `args`."""
    samples, exists = np.arange(len(args)), np.arange(args.shape[1]) < count[:, None]
    ascending = np.sort(np.where(exists, args, 10), axis=1)
    middle = ascending[samples, (count - 1) // 2] + ascending[samples, count // 2]
    results = {
        _MAX: ascending[samples, count - 1],
        _MIN: ascending[:, 0],
        _MED: middle // 2,
        _SUM: np.where(exists, args, 0).sum(axis=1) % 10,
    }
    return np.choose(operator, list(results.values()))


def generate(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Expressions of fewer than `lengths` tokens, each followed by its value, a digit."""
    drawn = expressions(keys, SHORTEST, lengths - 1, **opts)
    tokens = np.pad(drawn.tokens, ((0, 0), (0, padded_len - drawn.tokens.shape[1])))
    is_answer: Bool[np.ndarray, "N L"] = np.arange(padded_len) == drawn.lengths[:, None]
    tokens = np.where(is_answer, DIGIT + drawn.values[:, None], tokens)
    return Sequences(tokens, is_answer, drawn.lengths + 1)


TASK = SyntheticTask(
    name="listops",
    category="hierarchy",
    options={
        "max_depth": Option(10, 1),
        "max_args": Option(10, MIN_ARGS),
        "list_share": Option(0.25, 0.0),
    },
    generate=generate,
    chance=lambda opts: 1 / NUM_CLASSES,
    vocab_size=lambda opts: VOCAB_SIZE,
    min_len=lambda opts: SHORTEST + 1,
)
