"""The fifteen formal languages: worked examples, and solvers that are written unlike generators."""

import collections
import itertools
import pathlib

import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.config.fields import from_dict, to_dict
from xlstm_jax.data import DataConfig, load
from xlstm_jax.data.config import Split
from xlstm_jax.data.synthetic import automata, counting
from xlstm_jax.data.synthetic.registry import FORMAL_LANGUAGES, TASKS
from xlstm_jax.data.synthetic.samples import scaled_accuracy

LEN = (5, 24)
EXACT = {
    *("parity", "even_pairs", "cycle_navigation", "modular_arithmetic", "solve_equation"),
    *("modular_arithmetic_brackets", "majority", "majority_count"),
}
"""Tasks whose samples have exactly the number of tokens that was drawn; others may lack one."""

every_task = pytest.mark.parametrize("name", [task.name for task in FORMAL_LANGUAGES])


def samples(
    name, count, lengths=LEN, *, start=0, seq_len=None, seed=0, split: Split = "train", **options
):
    low, high = lengths
    cfg = DataConfig(
        source=name,
        seq_len=high - 1 if seq_len is None else seq_len,
        min_len=low,
        max_len=high,
        seed=seed,
        task=options,
    )
    return load(cfg, split).batch(np.arange(start, start + count))


def questions_and_answers(batch):
    """Token ids of every sample, as two lists; checks the layout."""
    for inputs, targets, segments in zip(*batch[:3], strict=True):
        (at,) = np.flatnonzero(targets >= 0).reshape(1, -1)
        first, last = at[0], at[-1]
        assert (at == np.arange(first, last + 1)).all(), "the answer is contiguous"
        assert (inputs[: first + 1] > 0).all() and (inputs[first + 1 :] == 0).all()
        assert (segments == (np.arange(len(inputs)) <= last)).all()
        yield inputs[: first + 1].tolist(), targets[first : last + 1].tolist()


def residues(text, ids):
    """Python's spelling of an expression, from its token ids."""
    return "".join(ids[token] if token in ids else str(token - max(ids) - 1) for token in text)


def alphabet(symbols):
    return dict(enumerate(symbols.split(), 1))


PLAIN, BRACKETS = alphabet("+ - * ="), alphabet("+ - * = ( )")
EQUATION = alphabet("ACT + - * = ( ) x")


def solve_parity(question, vocab_size=3):
    state = 0
    for token in question:
        state = (state + token - 1) % (vocab_size - 1)
    return [1 + state]


def solve_even_pairs(question):
    return [1 + sum(a != b for a, b in itertools.pairwise(question)) % 2]


def solve_cycle_navigation(question, vocab_size=9, max_step=1):
    moves = [0, *(sign * size for size in range(1, max_step + 1) for sign in (1, -1))]
    ring = vocab_size - len(moves) - 1
    position = 0
    for token in question:
        position = (position + moves[token - 1]) % ring
    return [len(moves) + 1 + position]


def solve_modular_arithmetic(question, vocab_size=10):
    *expression, equals = question
    assert PLAIN[equals] == "="
    return [5 + eval(residues(expression, PLAIN)) % (vocab_size - 5)]


def solve_modular_arithmetic_brackets(question, vocab_size=12, multiply=True):
    *expression, equals = question
    text = residues(expression, BRACKETS)
    assert BRACKETS[equals] == "=" and (multiply or "*" not in text)
    return [7 + eval(text) % (vocab_size - 7)]


def solve_solve_equation(question, vocab_size=14):
    *expression, equals, value, act = question
    text, modulus = residues(expression, EQUATION), vocab_size - 9
    assert (EQUATION[equals], EQUATION[act]) == ("=", "ACT")
    solutions = [x for x in range(modulus) if eval(text, {"x": x}) % modulus == value - 9]
    assert len(solutions) == 1
    return [9 + solutions[0]]


def solve_stack_manipulation(question, vocab_size=11):
    num_symbols = (vocab_size - 3) // 2
    stack, is_action = [], False
    assert question[-1] == 1 and 3 <= question[0] < 3 + num_symbols
    for token in question[:-1]:
        is_action |= not 3 <= token < 3 + num_symbols
        if token == 2:
            stack = stack[:-1]
        else:
            stack.append(token - num_symbols if is_action else token)
            assert not is_action or token >= 3 + num_symbols
    return stack


def word_of(question):
    assert question[-1] == 1 and 1 not in question[:-1]
    return question[:-1]


def solve_missing_duplicate(question, vocab_size=11):
    half = len(question) // 2
    word, copy = question[:half], question[half:]
    (missing,) = [i for i, token in enumerate(copy) if token == 1]
    assert copy[:missing] == word[:missing] and copy[missing + 1 :] == word[missing + 1 :]
    return [word[missing]]


def by_count(question):
    return min(collections.Counter(question).items(), key=lambda item: (-item[1], item[0]))


SOLVERS = {
    "parity": solve_parity,
    "even_pairs": solve_even_pairs,
    "cycle_navigation": solve_cycle_navigation,
    "modular_arithmetic": solve_modular_arithmetic,
    "modular_arithmetic_brackets": solve_modular_arithmetic_brackets,
    "solve_equation": solve_solve_equation,
    "stack_manipulation": solve_stack_manipulation,
    "reverse_string": lambda question, vocab_size=12: word_of(question)[::-1],
    "bucket_sort": lambda question, vocab_size=11: sorted(question),
    "missing_duplicate": solve_missing_duplicate,
    "odds_first": lambda q, vocab_size=12: [*word_of(q)[0::2], *word_of(q)[1::2]],
    "repetition": lambda question, vocab_size=12: word_of(question),
    "set": lambda question, vocab_size=128: [*dict.fromkeys(word_of(question))],
    "majority": lambda question, vocab_size=64: [by_count(question)[0]],
    "majority_count": lambda question, vocab_size=64: [min(by_count(question)[1], vocab_size - 1)],
}

# Symbols of a task in the order of their ids, from 1 on.
LETTERS = {
    "parity": "a b",
    "even_pairs": "a b",
    "cycle_navigation": "STAY +1 -1 P0 P1 P2 P3 P4",
    "modular_arithmetic": "+ - * = 0 1 2 3 4",
    "modular_arithmetic_brackets": "+ - * = ( ) 0 1 2 3 4",
    "solve_equation": "ACT + - * = ( ) x 0 1 2 3 4",
    "stack_manipulation": "ACT POP ST1 ST2 ST3 ST4 PS1 PS2 PS3 PS4",
    "missing_duplicate": "MIS " + " ".join(map(str, range(1, 10))),
    **dict.fromkeys(("reverse_string", "odds_first", "repetition"), "ACT 0 1 2 3 4 5 6 7 8 9"),
    "set": "ACT " + " ".join(map(str, range(126))),
    "bucket_sort": " ".join(map(str, range(1, 11))),
    **dict.fromkeys(("majority", "majority_count"), " ".join(map(str, range(1, 64)))),
}

EXAMPLES = [
    ("parity", "a b b a a b a | b"),
    ("parity", "a b b | a"),
    ("even_pairs", "a b b a a b a a | a"),
    ("even_pairs", "a b | b"),
    ("cycle_navigation", "STAY +1 -1 +1 STAY +1 +1 +1 -1 | P3"),
    ("cycle_navigation", "-1 -1 | P3"),
    ("modular_arithmetic", "0 - 4 + 0 - 2 = | 4"),
    ("modular_arithmetic", "2 + 3 * 4 = | 4"),
    ("modular_arithmetic", "1 - 2 * 3 * 2 + 4 = | 3"),
    ("modular_arithmetic_brackets", "( ( ( 2 ) * - 2 ) - ( - 4 - 2 ) ) = | 2"),
    ("modular_arithmetic_brackets", "( - 3 ) = | 2"),
    ("solve_equation", "( x + 3 ) = 1 ACT | 3"),
    ("solve_equation", "( ( 2 - x ) - ( 1 ) ) = 2 ACT | 4"),
    ("stack_manipulation", "ST1 ST1 ST3 POP POP PS3 PS3 ACT | ST1 ST3 ST3"),
    ("stack_manipulation", "ST2 POP POP PS4 ACT | ST4"),
    ("reverse_string", "2 4 8 6 2 ACT | 2 6 8 4 2"),
    ("bucket_sort", "1 4 8 6 1 | 1 1 4 6 8"),
    ("missing_duplicate", "4 8 6 2 5 4 8 6 2 MIS | 5"),
    ("missing_duplicate", "3 7 MIS 7 | 3"),
    ("odds_first", "2 7 3 2 6 9 ACT | 2 3 6 7 2 9"),
    ("repetition", "2 4 8 6 2 ACT | 2 4 8 6 2"),
    ("set", "8 6 6 3 5 4 5 3 ACT | 8 6 3 5 4"),
    ("majority", "1 7 6 4 3 8 1 7 2 | 1"),
    ("majority_count", "1 7 6 4 4 8 1 7 2 | 2"),
]


def encode(name, text):
    ids = {symbol: i for i, symbol in enumerate(LETTERS[name].split(), 1)}
    return [ids[symbol] for symbol in text.split()]


@pytest.mark.parametrize("name, example", EXAMPLES)
def test_worked_examples_have_their_answers(name, example):
    question, answer = (encode(name, part) for part in example.split("|"))
    assert SOLVERS[name](question) == answer
    in_generator = {
        "even_pairs": automata.even_pairs_answer,
        "cycle_navigation": automata.cycle_navigation_answer,
        "modular_arithmetic": automata.arithmetic_answer,
        "majority": lambda q: counting.most_frequent(q)[0],
        "majority_count": lambda q: counting.most_frequent(q)[1],
    }
    if name in in_generator:
        padded = np.array([[*question, 0, 0]])
        assert in_generator[name](padded).tolist() == answer


def test_published_ids_of_the_examples():
    assert encode("cycle_navigation", "STAY +1 -1 +1 P3") == [1, 2, 3, 2, 7]
    assert encode("modular_arithmetic", "0 - 4 + 0 - 2 = 4") == [5, 2, 9, 1, 5, 2, 7, 4, 9]


@every_task
def test_every_symbol_has_an_id_and_guessing_its_published_accuracy(name):
    options = TASKS[name].complete({})
    published = {
        **dict.fromkeys(("parity", "even_pairs"), 1 / 2),
        **dict.fromkeys(("cycle_navigation", "modular_arithmetic", "solve_equation"), 1 / 5),
        **{"modular_arithmetic_brackets": 1 / 5, "stack_manipulation": 1 / 4},
        **{
            "missing_duplicate": 1 / 9,
            "set": 1 / 126,
            "majority": 1 / 63,
            "majority_count": 1 / 63,
        },
    }
    assert TASKS[name].vocab_size(options) == 1 + len(LETTERS[name].split())
    assert TASKS[name].chance(options) == published.get(name, 1 / 10)


@every_task
@pytest.mark.parametrize("lengths", [None, LEN, (30, 64)], ids=["short", "medium", "long"])
def test_every_sample_satisfies_the_rule_of_its_task(name, lengths):
    least = TASKS[name].min_len({})
    batch = samples(name, 300, lengths or (least, least + 3))
    for question, answer in questions_and_answers(batch):
        assert SOLVERS[name](question) == answer


OTHER_OPTIONS = [
    ("parity", {"vocab_size": 5}),
    ("cycle_navigation", {"vocab_size": 9, "max_step": 2}),
    ("cycle_navigation", {"vocab_size": 6}),
    ("modular_arithmetic", {"vocab_size": 7}),
    ("modular_arithmetic_brackets", {"vocab_size": 16, "multiply": False}),
    ("solve_equation", {"vocab_size": 12}),
    ("stack_manipulation", {"vocab_size": 5}),
    *((name, {"vocab_size": 4}) for name in ("reverse_string", "missing_duplicate", "set")),
    *((name, {"vocab_size": 3}) for name in ("bucket_sort", "majority", "majority_count")),
]


@pytest.mark.parametrize("name, options", OTHER_OPTIONS)
def test_options_change_the_symbols(name, options):
    batch = samples(name, 300, (5, 20), **options)
    assert max(batch.inputs.max(), batch.targets.max()) < options["vocab_size"]
    for question, answer in questions_and_answers(batch):
        assert SOLVERS[name](question, **options) == answer


@every_task
def test_lengths_are_uniform(name):
    low, high = LEN
    lengths = samples(name, 6000).segment_ids.sum(axis=1) + 1
    if name == "modular_arithmetic":
        values, counts = np.unique(lengths, return_counts=True)
        assert values.tolist() == [*range(5, 24, 2)]
    elif name in EXACT:
        values, counts = np.unique(lengths, return_counts=True)
        assert values.tolist() == [*range(low, high + 1)]
    else:  # pairs of lengths, as those of one parity may be lowered by one
        assert low - 1 <= lengths.min() and lengths.max() <= high
        odd = name not in ("bucket_sort", "stack_manipulation")
        counts = np.bincount((lengths + (1 - odd)) // 2)
        counts = counts[counts > 0][1:-1]
    if name not in ("set", "stack_manipulation"):
        np.testing.assert_allclose(counts, counts.mean(), rtol=0.25)
    else:
        assert counts.min() > 0.6 * counts.mean()


@pytest.mark.parametrize(
    "name",
    ["parity", "even_pairs", "cycle_navigation", "solve_equation", "missing_duplicate"],
)
def test_answers_are_balanced(name):
    batch = samples(name, 6000, (20, 24))
    _, counts = np.unique(batch.targets[batch.weights > 0], return_counts=True)
    assert len(counts) == round(1 / TASKS[name].chance(TASKS[name].complete({})))
    np.testing.assert_allclose(counts / counts.sum(), 1 / len(counts), atol=0.025)


@every_task
def test_a_sample_depends_on_seed_split_and_index_alone(name):
    many, alone = samples(name, 50), samples(name, 1, start=37)
    for leaf, leaf_alone in zip(many, alone, strict=True):
        np.testing.assert_array_equal(leaf[37], leaf_alone[0])
    others = [samples(name, 50, seed=1), samples(name, 50, split="test")]
    assert all((many.inputs != other.inputs).any(axis=1).mean() > 0.9 for other in others)


@every_task
def test_a_longer_sequence_only_adds_padding(name):
    narrow, wide = samples(name, 100), samples(name, 100, seq_len=70)
    T = narrow.inputs.shape[1]
    np.testing.assert_array_equal(narrow.inputs, wide.inputs[:, :T])
    np.testing.assert_array_equal(narrow.targets, wide.targets[:, :T])
    assert (wide.segment_ids[:, T:] == 0).all() and (wide.targets[:, T:] == -1).all()


def test_a_stack_ends_with_a_pop_as_often_as_a_pop_is_drawn():
    batch = samples("stack_manipulation", 4000, (40, 40))
    questions = [question for question, _ in questions_and_answers(batch)]
    actions = [q[-2] for q in questions if q[-2] == 2 or q[-2] > 6]
    assert np.mean(np.array(actions) == 2) == pytest.approx(1 / 5, abs=0.03)


def test_each_digit_of_an_equation_is_hidden_as_often():
    inputs = samples("solve_equation", 2000, (9, 9)).inputs  # (d + d) or (d - d)
    assert np.mean(inputs[:, 1] == 8) == pytest.approx(1 / 2, abs=0.04)
    assert ((inputs[:, 1] == 8) ^ (inputs[:, 3] == 8)).all()


def test_scaled_accuracy_is_zero_at_chance_and_negative_below():
    assert scaled_accuracy(0.75, 0.5) == 0.5
    assert scaled_accuracy(0.2, 0.2) == 0
    assert scaled_accuracy(0.1, 0.2) < 0


@pytest.mark.parametrize(
    ("name", "lengths", "options", "message"),
    [
        (
            "parity",
            LEN,
            {"vocab": 5},
            "data.task.vocab is not an option .*; did you mean vocab_siz",
        ),
        (
            "even_pairs",
            LEN,
            {"vocab_size": 5},
            "not an option of the task even_pairs; leave it out",
        ),
        (
            "parity",
            LEN,
            {"vocab_size": 2},
            "vocab_size must be at least 3, got 2; set data.task.vocab",
        ),
        ("set", LEN, {"vocab_size": 2**31}, "vocab_size must be at most 2147483647"),
        ("parity", LEN, {"vocab_size": 3.5}, "data.task.vocab_size must be int, got 3.5"),
        (
            *("cycle_navigation", LEN, {"max_step": 3}),
            "vocab_size must be at least 10 with max_step=3, got 9",
        ),
        ("solve_equation", (3, 9), {}, "min_len must be at least 5, .* got 3; set data.min_len=5"),
        ("modular_arithmetic", (2, 9), {}, "min_len must be at least 3, the shortest sample"),
    ],
)
def test_invalid_options_and_lengths_are_refused(name, lengths, options, message):
    with pytest.raises(ConfigError, match=message):
        samples(name, 1, lengths, **options)


def test_options_of_a_task_need_a_task():
    with pytest.raises(ConfigError, match="data.task=.* has no effect with data.source='grammar'"):
        load(DataConfig(source="grammar", task={"vocab_size": 5}), "train")


def test_the_docs_have_the_vocabulary_of_every_task():
    text = (pathlib.Path(__file__).parents[2] / "docs/tasks.md").read_text()
    entries = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")
    ]
    sizes = {entry[0].strip("`"): int(entry[3]) for entry in entries}
    expected = {t.name: t.vocab_size(t.complete({})) for t in FORMAL_LANGUAGES}
    assert expected.items() <= sizes.items()


def test_options_are_recorded_only_where_they_are_set():
    assert "task" not in to_dict(DataConfig(source="parity"))
    cfg = DataConfig(source="parity", task={"vocab_size": 5})
    assert from_dict(DataConfig, to_dict(cfg)) == cfg
    assert load(cfg, "train").description["task"] == {"vocab_size": 5}
    assert "task" not in load(DataConfig(source="parity"), "train").description
