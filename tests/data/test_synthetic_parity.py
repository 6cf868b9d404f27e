"""The parity task: the published examples, the frame, and samples by number."""

import functools

import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, batch_at, eval_batches, load
from xlstm_jax.data.synthetic import parity
from xlstm_jax.data.synthetic.samples import Samples, frame


def samples(seed, split, start, count, *lengths, vocab_size=parity.VOCAB_SIZE):
    """Samples start .. start + count - 1; `lengths` are the least, the most, and the tokens L."""
    low, high, row_len = lengths
    cfg = DataConfig(seq_len=row_len - 1, seed=seed, min_len=low, max_len=high)
    task = functools.partial(parity.task, vocab_size=vocab_size)
    return Samples(task, vocab_size, cfg, split).batch(np.arange(start, start + count))


@pytest.mark.parametrize(
    ("question", "vocab_size", "expected"),
    [([1, 2, 2, 1, 1, 2, 1], 3, 2), ([1, 2, 2], 3, 1), ([1, 3, 4], 5, 2)],
)
def test_the_worked_examples_have_their_answers(question, vocab_size, expected):
    assert parity.answer(np.array([question]), vocab_size) == expected
    assert parity.answer(np.array([[*question, 0, 0]]), vocab_size) == expected


def test_the_worked_frame_asks_for_the_answer_under_the_last_symbol():
    row = np.array([[1, 2, 2, 1, 0, 0]])
    batch = frame(row, np.arange(6)[None] == 3, np.array([4]), np.array([0]))
    assert batch.inputs.tolist() == [[1, 2, 2, 0, 0]]
    assert batch.targets.tolist() == [[-1, -1, 1, -1, -1]]
    assert batch.weights.tolist() == [[0, 0, 1, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 0, 0]]


def test_an_answer_of_several_tokens_is_never_fed_in():
    row = np.array([[5, 6, 1, 6, 5, 0]])  # two symbols, a marker, the symbols reversed
    batch = frame(row, np.array([[0, 0, 0, 1, 1, 0]], bool), np.array([5]), np.array([0]))
    assert batch.inputs.tolist() == [[5, 6, 1, 0, 0]]
    assert batch.targets.tolist() == [[-1, -1, 6, 5, -1]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 0]]


@pytest.mark.parametrize("vocab_size", [3, 5])
def test_samples_are_framed_questions_with_right_answers(vocab_size):
    batch = samples(0, "train", 0, 500, 3, 40, 48, vocab_size=vocab_size)
    assert batch.inputs.shape == (500, 47)
    for inputs, targets, segments, weights in zip(*batch[:4], strict=True):
        (asked,) = np.flatnonzero(weights)
        question = inputs[: asked + 1]
        assert 1 <= question.min() and question.max() < vocab_size
        assert (inputs[asked + 1 :] == 0).all()
        assert targets[asked] == parity.answer(question[None], vocab_size)
        assert (np.delete(targets, asked) == -1).all()
        np.testing.assert_array_equal(segments, np.arange(47) <= asked)


def test_lengths_symbols_and_answers_are_uniform():
    batch = samples(0, "train", 0, 20_000, 3, 10, 10)
    lengths = batch.segment_ids.sum(axis=1) + 1
    np.testing.assert_allclose(np.bincount(lengths)[3:], 20_000 / 8, rtol=0.1)
    assert lengths.min() == 3 and lengths.max() == 10
    assert np.mean(batch.inputs[batch.segment_ids == 1] == 2) == pytest.approx(0.5, abs=0.01)
    assert np.mean(batch.targets[batch.weights == 1] == 2) == pytest.approx(0.5, abs=0.02)


def rows(batch):
    return {tuple(row) for row in batch.inputs}


def test_a_sample_depends_on_its_number_alone_and_not_on_its_neighbours():
    many = samples(7, "test", 0, 100, 20, 40, 40)
    for number in (0, 41, 99):
        alone = samples(7, "test", number, 1, 20, 40, 40)
        for whole, part in zip(many, alone, strict=True):
            np.testing.assert_array_equal(whole[number], part[0])


def test_seeds_and_splits_have_samples_of_their_own():
    sets = [
        rows(samples(seed, split, 0, 200, 40, 40, 40))
        for seed in (0, 1)
        for split in ("train", "valid", "test")
    ]
    assert len(set.union(*sets)) == 6 * 200


def test_a_wider_row_only_adds_padding():
    narrow = samples(0, "train", 0, 50, 3, 20, 20)
    wide = samples(0, "train", 0, 50, 3, 20, 64)
    np.testing.assert_array_equal(narrow.inputs, wide.inputs[:, :19])
    assert (wide.segment_ids[:, 19:] == 0).all()


def test_the_loader_serves_the_samples_in_their_order():
    cfg = DataConfig(source="parity", seq_len=39, batch_size=8, seed=5, min_len=3, max_len=30)
    expected = samples(5, "train", 3 * 8, 8, 3, 30, 40)
    for got, wanted in zip(batch_at(load(cfg, "train"), cfg, 3), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert load(cfg, "train").vocab_size == 3
    assert load(cfg, "train").description["max_len"] == 30


def test_held_out_samples_are_counted_and_the_longest_fill_a_row():
    cfg = DataConfig(source="parity", seq_len=15, batch_size=8, num_eval_samples=100)
    seen = list(eval_batches(load(cfg, "valid"), cfg))
    assert len(seen) == 13
    assert sum(batch.weights.sum() for batch in seen) == 100
    assert max(batch.segment_ids.sum(axis=1).max() for batch in seen) == 15


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        ((1, 5, 8), "min_len must be at least 2, got 1; leave it out"),
        ((6, 5, 8), "max_len must be at least min_len=6, got 5; raise max_len"),
        ((3, 9, 8), "max_len must be at most the row's 8 tokens .*, got 9; make the rows longer"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths, sentence):
    with pytest.raises(ConfigError, match=sentence):
        samples(0, "train", 0, 1, *lengths)


def test_lengths_that_do_not_fit_are_refused_when_the_data_is_loaded():
    with pytest.raises(ConfigError, match="max_len must be at most the row's 21 tokens"):
        load(DataConfig(source="parity", seq_len=20, max_len=40), "train")
    with pytest.raises(ConfigError, match="max_len must be at least min_len=3, got 2"):
        load(DataConfig(source="parity", seq_len=1), "train")
