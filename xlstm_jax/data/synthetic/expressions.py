"""Modular arithmetic with brackets, and solving an equation: deterministic context-free languages.

An expression E(l) has exactly l tokens. E(1) to E(4) are d, -d, (d) and (-d) with a random digit d.
A longer one is (E(left) op E(l - 3 - left)) with `left` uniform in [1, l - 4].

- Modular arithmetic with brackets: the expression, =, and its value modulo the number of digits.
- Solve equation: the expression has no products and one of its digits, uniformly chosen, is
  replaced by x. Then =, the value, ACT and the digit; without products, the value determines it.

Sources: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1; Delétang et al. 2023, arXiv:2207.02098,
for the recursive rule.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from xlstm_jax.data import hashing
from xlstm_jax.data.synthetic.draws import draw_one, one_answer
from xlstm_jax.data.synthetic.tasks import PAD, Option, Options, Sequences, SyntheticTask

ACT = 1
"""Token id in equations, before the answer."""

_LEFT, _OPERATOR, _DIGIT, _HIDDEN = 0, 1, 2, 3  # streams of random numbers


class Symbols(NamedTuple):
    """Token ids of expressions; digits are the ids from `digit` on."""

    plus: int
    minus: int
    times: int
    equals: int
    opening: int
    closing: int
    digit: int
    unknown: int = PAD  # x, in equations


BRACKETS = Symbols(1, 2, 3, 4, 5, 6, digit=7)
EQUATION = Symbols(2, 3, 4, 5, 6, 7, digit=9, unknown=8)


class Nodes(NamedTuple):
    """Expressions of one depth: their samples, first positions and numbers of tokens."""

    sample: Int64[np.ndarray, "nodes"]
    start: Int64[np.ndarray, "nodes"]
    length: Int64[np.ndarray, "nodes"]

    def where(self, chosen: Bool[np.ndarray, "nodes"]) -> "Nodes":
        """The chosen ones."""
        return Nodes(*(field[chosen] for field in self))


def write_expressions(
    tokens: Int64[np.ndarray, "N L"],
    keys: UInt64[np.ndarray, "N"],
    lengths: Int64[np.ndarray, "N"],
    modulus: int,
    symbols: Symbols,
    *,
    multiply: bool,
) -> Int64[np.ndarray, "N"]:
    """Writes one expression to the beginning of every sample; returns the values.

    All expressions of a depth are handled at once, from the outermost one.
    """
    nodes = Nodes(np.arange(len(keys)), np.zeros_like(lengths), lengths)
    # Every expression begins at another position, or is the digit of one: keys by position.
    operators, leaves = [], []
    while len(nodes.sample):
        is_leaf = nodes.length <= 4
        leaves.append(
            (is_leaf, _write_leaves(tokens, keys, nodes.where(is_leaf), modulus, symbols))
        )
        inner = nodes.where(~is_leaf)
        left, operator = _write_inner(tokens, keys, inner, symbols, multiply=multiply)
        operators.append(operator)
        sample, start, length = inner
        nodes = Nodes(
            np.concatenate([sample, sample]),
            np.concatenate([start + 1, start + 2 + left]),
            np.concatenate([left, length - 3 - left]),
        )
    values = np.zeros(0, np.int64)  # of the expressions one level deeper
    for (is_leaf, of_leaves), operator in zip(leaves[::-1], operators[::-1], strict=True):
        a, b = np.split(values, 2)
        values = np.empty(len(is_leaf), np.int64)
        values[is_leaf] = of_leaves
        values[~is_leaf] = np.select([operator == 0, operator == 1], [a + b, a - b], a * b)
        values %= modulus
    return values


def _write_leaves(tokens, keys, leaves: Nodes, modulus: int, symbols: Symbols):
    """Writes d, -d, (d) or (-d); returns the values."""
    sample, start, length = leaves
    digit = draw_one(_key_at(keys, leaves), np.full_like(sample, modulus), _DIGIT)
    is_negative, is_closed = length % 2 == 0, length >= 3
    tokens[sample[is_closed], start[is_closed]] = symbols.opening
    tokens[sample[is_closed], (start + length - 1)[is_closed]] = symbols.closing
    minus = start + is_closed
    tokens[sample[is_negative], minus[is_negative]] = symbols.minus
    tokens[sample, minus + is_negative] = symbols.digit + digit
    return np.where(is_negative, -digit, digit)


def _write_inner(tokens, keys, inner: Nodes, symbols: Symbols, *, multiply: bool):
    """Writes brackets and operators; returns the lengths of left sides, and the operators."""
    sample, start, length = inner
    own = _key_at(keys, inner)
    left = 1 + draw_one(own, length - 4, _LEFT)
    operator = draw_one(own, np.full_like(sample, 3 if multiply else 2), _OPERATOR)
    tokens[sample, start] = symbols.opening
    tokens[sample, start + length - 1] = symbols.closing
    ids = np.array([symbols.plus, symbols.minus, symbols.times])
    tokens[sample, start + 1 + left] = ids[operator]
    return left, operator


def _key_at(keys, nodes: Nodes):
    return hashing.fold(keys[nodes.sample], nodes.start.astype(np.uint64))


def brackets(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Random expressions and their values."""
    tokens = np.full((len(keys), padded_len), PAD)
    modulus = opts["vocab_size"] - BRACKETS.digit
    values = write_expressions(
        tokens, keys, lengths - 2, modulus, BRACKETS, multiply=opts["multiply"]
    )
    tokens[np.arange(len(keys)), lengths - 2] = BRACKETS.equals
    return one_answer(tokens, lengths, BRACKETS.digit + values)


def equations(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Random equations and the digits that solve them."""
    tokens, samples = np.full((len(keys), padded_len), PAD), np.arange(len(keys))
    modulus = opts["vocab_size"] - EQUATION.digit
    values = write_expressions(tokens, keys, lengths - 4, modulus, EQUATION, multiply=False)
    is_digit = tokens >= EQUATION.digit
    chosen = draw_one(keys, is_digit.sum(axis=1), _HIDDEN)
    hidden = np.argmax(is_digit.cumsum(axis=1) > chosen[:, None], axis=1)
    answer = tokens[samples, hidden]
    tokens[samples, hidden] = EQUATION.unknown
    tokens[samples, lengths - 4] = EQUATION.equals
    tokens[samples, lengths - 3] = EQUATION.digit + values
    tokens[samples, lengths - 2] = ACT
    return one_answer(tokens, lengths, answer)


MODULAR_ARITHMETIC_BRACKETS = SyntheticTask(
    name="modular_arithmetic_brackets",
    category="deterministic context-free",
    options={"vocab_size": Option(12, BRACKETS.digit + 2), "multiply": Option(True)},
    generate=brackets,
    chance=lambda opts: 1 / (opts["vocab_size"] - BRACKETS.digit),
    min_len=lambda opts: 3,
)
SOLVE_EQUATION = SyntheticTask(
    name="solve_equation",
    category="deterministic context-free",
    options={"vocab_size": Option(14, EQUATION.digit + 2)},
    generate=equations,
    chance=lambda opts: 1 / (opts["vocab_size"] - EQUATION.digit),
    min_len=lambda opts: 5,
)
