"""Associative recall, nearest neighbors and ListOps: published examples and independent solvers."""

import math
import statistics

import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, load
from xlstm_jax.data.synthetic import listops, mqar, nearest_neighbor
from xlstm_jax.data.synthetic.samples import sample_keys, shift_targets
from xlstm_jax.errors import ArgumentError

RECALL = DataConfig(
    source="mqar", seq_len=32, min_len=33, seed=3, task={"vocab_size": 64, "num_pairs": 4}
)
NEIGHBOR = DataConfig(source="nearest_neighbor", seq_len=24, min_len=2, seed=3)
LISTS = DataConfig(
    source="listops", seq_len=64, min_len=20, seed=3, task={"max_depth": 3, "max_args": 5}
)


def batch(cfg, count=300, split="train", **changes):
    fields = {name: getattr(cfg, name) for name in cfg.__dataclass_fields__} | changes
    return load(DataConfig(**fields), split).batch(np.arange(count))


# Associative recall.


def test_the_published_layout_of_recall_has_its_targets_at_the_queries():
    sample, is_answer = mqar.layout(np.array([[2, 4]]), np.array([[8, 7]]), np.array([[4, 1]]), 17)
    result = shift_targets(sample, is_answer, np.array([17]), np.array([0]))
    assert result.inputs.tolist() == [[2, 8, 4, 7, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0, 0]]
    expected = np.full(16, -1)
    expected[[6, 12]] = 7, 8
    np.testing.assert_array_equal(result.targets[0], expected)
    assert result.segment_ids.all()


@pytest.mark.parametrize("random_blanks", [False, True])
def test_every_key_is_queried_once_and_its_value_is_the_target(random_blanks):
    data = batch(RECALL, task=RECALL.task | {"random_blanks": random_blanks})
    for inputs, targets, weights in zip(data.inputs, data.targets, data.weights, strict=True):
        pairs = dict(zip(inputs[:8:2].tolist(), inputs[1:8:2].tolist(), strict=True))
        assert len(pairs) == len(set(pairs.values())) == 4
        assert all(0 < key < 32 <= value < 64 for key, value in pairs.items())
        (queries,) = np.nonzero(weights)
        assert sorted(inputs[queries]) == sorted(pairs) and (queries % 2 == 0).all()
        assert [pairs[key] for key in inputs[queries]] == targets[queries].tolist()
        assert (np.delete(targets, queries) == -1).all()
        if not random_blanks:
            assert not np.delete(inputs[8:], queries - 8).any()
    if random_blanks:
        blanks = data.inputs[:, 8:][data.weights[:, 8:] == 0]
        assert set(range(64)) == set(blanks.tolist())


def test_slots_are_drawn_by_their_weights():
    keys = sample_keys(0, "train", np.arange(40_000))
    slots = mqar.draw_slots(keys, np.full(40_000, 4), 2, 0.5)
    weights = np.arange(1, 5) ** -0.5
    first = weights / weights.sum()
    np.testing.assert_allclose(np.bincount(slots[:, 0]) / 40_000, first, atol=0.01)
    # The second draw has the same weights without the first slot.
    rest = np.where(np.eye(4, dtype=bool), 0, weights)
    second = first @ (rest / rest.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.bincount(slots[:, 1]) / 40_000, second, atol=0.01)
    assert (slots[:, 0] != slots[:, 1]).all()


def test_shorter_recall_sequences_have_an_even_length_and_all_queries():
    data = batch(RECALL, min_len=17)
    lengths = data.segment_ids.sum(axis=1)
    assert set(lengths.tolist()) == set(range(16, 33, 2))
    assert (data.weights.sum(axis=1) == 4).all()
    assert not (data.weights * (data.segment_ids == 0)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_len": 16}, "min_len must be at least 17, the shortest sample of the task mqar"),
        ({"task": {"num_pairs": 4, "vocab_size": 9}}, "vocab_size must be at least 10"),
        ({"task": {"num_pairs": 0}}, "num_pairs must be at least 1, got 0"),
    ],
)
def test_recall_that_does_not_fit_is_rejected(changes, message):
    with pytest.raises(ConfigError, match=message):
        batch(RECALL, **changes)


# Nearest neighbors.


def test_the_target_is_the_value_of_the_closest_vector_so_far():
    angles = np.radians([0, 90, 10, 45])
    values = [0.5, 0.2, 0.7, 0.9]
    x = np.stack([np.cos(angles), np.sin(angles), values], axis=-1)[None]
    np.testing.assert_allclose(nearest_neighbor.nearest_values(x)[0], [0, 0.2, 0.7, 0.7])


def test_targets_equal_those_of_a_search_by_distance():
    data = batch(NEIGHBOR)
    for x, targets, weights in zip(data.inputs, data.targets, data.weights, strict=True):
        length = int(weights.sum()) + 1
        assert weights[0] == 0 and weights[1:length].all()
        assert not x[length:].any() and not targets[length:].any()
        distances = [math.dist(x[0, :2], v[:2]) for v in x[1:length]]
        for t in range(1, length):
            assert targets[t] == x[1 + int(np.argmin(distances[:t])), 2]
    lengths = data.segment_ids.sum(axis=1)
    assert set(lengths.tolist()) == set(range(2, 25))


def test_vectors_are_uniform_on_the_circle_and_values_uniform():
    data = batch(NEIGHBOR, count=3000, min_len=24)
    x = data.inputs.reshape(-1, 3)
    np.testing.assert_allclose(np.hypot(x[:, 0], x[:, 1]), 1, atol=1e-6)
    angle = np.arctan2(x[:, 1], x[:, 0])
    for numbers, low, high in ((angle, -np.pi, np.pi), (x[:, 2], 0, 1)):
        counts, _ = np.histogram(numbers, 10, (low, high))
        np.testing.assert_allclose(counts, len(x) / 10, rtol=0.05)
    error = np.var(data.targets[:, 1:])
    assert error == pytest.approx(nearest_neighbor.CONSTANT_MSE, rel=0.05)


def test_lengths_beyond_the_sequence_are_rejected():
    with pytest.raises(ConfigError, match="max_len must be from min_len=2 to seq_len=24 vectors"):
        batch(NEIGHBOR, max_len=25)


# ListOps.


def value_of(symbols):
    """The value of an expression that starts a list of symbols, which it removes."""
    symbol = symbols.pop(0)
    if not symbol.startswith("["):
        return int(symbol)
    args = []
    while symbols[0] != "]":
        args.append(value_of(symbols))
    symbols.pop(0)
    solve = {"[MAX": max, "[MIN": min, "[SM": lambda a: sum(a) % 10}
    return int(solve.get(symbol, statistics.median)(args))


def depth_and_width(symbols):
    """Lists within each other, and the most elements of a list."""
    counts, depth, width = [], 0, 0
    for symbol in symbols:
        if symbol == "]":
            width = max(width, counts.pop())
            continue
        if counts:
            counts[-1] += 1
        if symbol.startswith("["):
            counts.append(0)
            depth = max(depth, len(counts))
    return depth, width


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5),
        ("[SM 5 7 ]", 2),
        ("[MED 1 4 ]", 2),
    ],
)
def test_published_expressions_have_their_values(text, value):
    assert value_of(text.split()) == value
    ids = listops.encode(text)
    assert [listops.SYMBOLS[i - listops.DIGIT] for i in ids] == text.split()


def test_generated_expressions_have_their_values_and_stay_within_their_bounds():
    drawn = listops.expressions(
        sample_keys(0, "train", np.arange(2000)), 10, 40, max_depth=3, max_args=5
    )
    seen = []
    for tokens, length, value in zip(*drawn, strict=True):
        symbols = [listops.SYMBOLS[i - 1] for i in tokens[:length]]
        assert not tokens[length:].any() and 10 <= length <= 40
        seen.append(depth_and_width(symbols))
        assert value_of(symbols) == value and not symbols
    depths, widths = zip(*seen, strict=True)
    assert max(depths) == 3
    assert max(widths) == 5
    assert set(drawn.values.tolist()) == set(range(10))
    assert len({tuple(t) for t in drawn.tokens}) > 1990


def test_an_expression_depends_on_its_key_alone():
    keys = sample_keys(0, "train", np.arange(50))
    many = listops.expressions(keys, 10, 40, max_depth=3, max_args=5)
    for n in (0, 17, 49):
        alone = listops.expressions(keys[[n]], 10, 40, max_depth=3, max_args=5)
        for leaf, leaf_alone in zip(many, alone, strict=True):
            np.testing.assert_array_equal(leaf[n], leaf_alone[0])


def test_the_value_of_an_expression_is_the_token_after_it():
    data = batch(LISTS)
    for inputs, targets, weights in zip(data.inputs, data.targets, data.weights, strict=True):
        (last,) = np.flatnonzero(weights)
        symbols = [listops.SYMBOLS[i - 1] for i in inputs[: last + 1]]
        assert value_of(symbols) == targets[last] - listops.DIGIT
    assert (data.segment_ids.sum(axis=1) <= 64).all()


def test_parentheses_of_published_files_are_left_out():
    np.testing.assert_array_equal(
        listops.encode("( ( ( [MAX 4 ) 3 ) ] )"), listops.encode("[MAX 4 3 ]")
    )
    with pytest.raises(ArgumentError, match=r"must consist of 0 1 .*, got '\[FIRST'; separate"):
        listops.encode("[FIRST 1 2 ]")


@pytest.mark.parametrize(
    ("bounds", "limits", "message"),
    [
        ((20, 30), (1, 5), "min_len and max_len must overlap 4 to 7, .* got 20 and 30; change"),
        ((4, 30), (0, 5), "max_depth must be at least 1 and max_args at least 2, got 0 and 5"),
        ((5, 5), (1, 9), None),
    ],
)
def test_bounds_that_no_expression_meets_are_rejected(bounds, limits, message):
    options = dict(zip(("max_depth", "max_args"), limits, strict=True))
    keys = sample_keys(0, "train", np.arange(3))
    if message is None:
        assert (listops.expressions(keys, *bounds, **options).lengths == 5).all()
        return
    with pytest.raises(ConfigError, match=message):
        listops.expressions(keys, *bounds, **options)


def test_bounds_that_hardly_any_expression_meets_are_rejected(monkeypatch):
    monkeypatch.setattr(listops, "MAX_ATTEMPTS", 3)
    keys = sample_keys(0, "train", np.arange(3))
    with pytest.raises(ConfigError, match="must be lengths that occur, but none of 3 draws"):
        listops.expressions(keys, 150, 155, max_depth=3, max_args=5)


# All of them.


@pytest.mark.parametrize("cfg", [RECALL, NEIGHBOR, LISTS], ids=lambda cfg: cfg.source)
def test_samples_depend_on_seed_split_and_index_only(cfg):
    many = batch(cfg, 60)
    alone = load(cfg, "train").batch(np.array([41]))
    for leaf, leaf_alone in zip(many, alone, strict=True):
        np.testing.assert_array_equal(leaf[41], leaf_alone[0])
    others = [batch(cfg, 60, split="valid"), batch(cfg, 60, seed=4)]
    samples = [{leaf.tobytes() for leaf in data.inputs} for data in (many, *others)]
    assert len(set.union(*samples)) >= 178


@pytest.mark.parametrize(
    ("cfg", "changes"),
    [(RECALL, {"max_len": 33}), (NEIGHBOR, {"max_len": 24}), (LISTS, {"max_len": 65})],
    ids=lambda value: getattr(value, "source", ""),
)
def test_a_larger_seq_len_only_adds_padding(cfg, changes):
    narrow = batch(cfg, 40)
    wide = batch(cfg, 40, seq_len=cfg.seq_len + 10, **changes)
    for a, b in zip(narrow[:4], wide[:4], strict=True):
        np.testing.assert_array_equal(a, b[:, : cfg.seq_len])
    assert not wide.segment_ids[:, cfg.seq_len :].any()
