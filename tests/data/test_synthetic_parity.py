"""The parity task: published examples, shifted targets, and samples by index."""

import dataclasses

import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, batch_at, eval_batches, load
from xlstm_jax.data.synthetic import parity
from xlstm_jax.data.synthetic.samples import Samples, shift_targets


def samples(seed, split, start, count, *lengths, vocab_size=parity.VOCAB_SIZE):
    """Samples start .. start + count - 1; `lengths` are min_len, max_len and L."""
    low, high, padded_len = lengths
    cfg = DataConfig(seq_len=padded_len - 1, seed=seed, min_len=low, max_len=high)
    cfg = dataclasses.replace(cfg, task={"vocab_size": vocab_size})
    return Samples(parity.TASK, cfg, split).batch(np.arange(start, start + count))


@pytest.mark.parametrize(
    ("question", "vocab_size", "expected"),
    [([1, 2, 2, 1, 1, 2, 1], 3, 2), ([1, 2, 2], 3, 1), ([1, 3, 4], 5, 2)],
)
def test_published_examples_have_their_answers(question, vocab_size, expected):
    assert parity.answer(np.array([question]), vocab_size) == expected
    assert parity.answer(np.array([[*question, 0, 0]]), vocab_size) == expected


def test_the_answer_is_the_target_at_the_last_symbol():
    tokens = np.array([[1, 2, 2, 1, 0, 0]])
    batch = shift_targets(tokens, np.arange(6)[None] == 3, np.array([4]), np.array([0]))
    assert batch.inputs.tolist() == [[1, 2, 2, 0, 0]]
    assert batch.targets.tolist() == [[-1, -1, 1, -1, -1]]
    assert batch.weights.tolist() == [[0, 0, 1, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 0, 0]]


def test_an_answer_of_several_tokens_is_not_part_of_the_inputs():
    tokens = np.array([[5, 6, 1, 6, 5, 0]])  # two symbols, a marker, the symbols reversed
    answers = np.array([[0, 0, 0, 1, 1, 0]], bool)
    batch = shift_targets(tokens, answers, np.array([5]), np.array([0]))
    assert batch.inputs.tolist() == [[5, 6, 1, 0, 0]]
    assert batch.targets.tolist() == [[-1, -1, 6, 5, -1]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 0]]


@pytest.mark.parametrize("vocab_size", [3, 5])
def test_samples_are_padded_questions_with_correct_answers(vocab_size):
    batch = samples(0, "train", 0, 500, 3, 40, 48, vocab_size=vocab_size)
    assert batch.inputs.shape == (500, 47)
    for inputs, targets, segments, weights in zip(*batch[:4], strict=True):
        (last,) = np.flatnonzero(weights)
        question = inputs[: last + 1]
        assert 1 <= question.min() and question.max() < vocab_size
        assert (inputs[last + 1 :] == 0).all()
        assert targets[last] == parity.answer(question[None], vocab_size)
        assert (np.delete(targets, last) == -1).all()
        np.testing.assert_array_equal(segments, np.arange(47) <= last)


def test_lengths_symbols_and_answers_are_uniform():
    batch = samples(0, "train", 0, 20_000, 3, 10, 10)
    lengths = batch.segment_ids.sum(axis=1) + 1
    np.testing.assert_allclose(np.bincount(lengths)[3:], 20_000 / 8, rtol=0.1)
    assert lengths.min() == 3 and lengths.max() == 10
    assert np.mean(batch.inputs[batch.segment_ids == 1] == 2) == pytest.approx(0.5, abs=0.01)
    assert np.mean(batch.targets[batch.weights == 1] == 2) == pytest.approx(0.5, abs=0.02)


def distinct_inputs(batch):
    return {tuple(inputs) for inputs in batch.inputs}


def test_a_sample_depends_on_its_index_alone():
    many = samples(7, "test", 0, 100, 20, 40, 40)
    for index in (0, 41, 99):
        alone = samples(7, "test", index, 1, 20, 40, 40)
        for leaf, leaf_alone in zip(many, alone, strict=True):
            np.testing.assert_array_equal(leaf[index], leaf_alone[0])


def test_seeds_and_splits_have_different_samples():
    sets = [
        distinct_inputs(samples(seed, split, 0, 200, 40, 40, 40))
        for seed in (0, 1)
        for split in ("train", "valid", "test")
    ]
    assert len(set.union(*sets)) == 6 * 200


def test_a_larger_seq_len_only_adds_padding():
    narrow = samples(0, "train", 0, 50, 3, 20, 20)
    wide = samples(0, "train", 0, 50, 3, 20, 64)
    np.testing.assert_array_equal(narrow.inputs, wide.inputs[:, :19])
    assert (wide.segment_ids[:, 19:] == 0).all()


def test_the_loader_returns_the_samples_in_order():
    cfg = DataConfig(source="parity", seq_len=39, batch_size=8, seed=5, min_len=3, max_len=30)
    expected = samples(5, "train", 3 * 8, 8, 3, 30, 40)
    for a, b in zip(batch_at(load(cfg, "train"), cfg, 3), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert load(cfg, "train").vocab_size == 3
    assert load(cfg, "train").description["max_len"] == 30


def test_the_validation_split_has_num_eval_samples_up_to_seq_len():
    cfg = DataConfig(source="parity", seq_len=15, batch_size=8, num_eval_samples=100)
    seen = list(eval_batches(load(cfg, "valid"), cfg))
    assert len(seen) == 13
    assert sum(batch.weights.sum() for batch in seen) == 100
    assert max(batch.segment_ids.sum(axis=1).max() for batch in seen) == 15


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((1, 5, 8), "min_len must be at least 2, got 1; the default is"),
        ((6, 5, 8), "max_len must be at least min_len=6, got 5; raise max_len"),
        ((3, 9, 8), "max_len must be at most 8 tokens .*, got 9; raise data.seq_len"),
    ],
)
def test_invalid_lengths_are_rejected(lengths, message):
    with pytest.raises(ConfigError, match=message):
        samples(0, "train", 0, 1, *lengths)


def test_invalid_lengths_are_rejected_when_the_data_are_loaded():
    with pytest.raises(ConfigError, match="max_len must be at most 21 tokens"):
        load(DataConfig(source="parity", seq_len=20, max_len=40), "train")
    with pytest.raises(ConfigError, match="max_len must be at least min_len=3, got 2"):
        load(DataConfig(source="parity", seq_len=1), "train")
