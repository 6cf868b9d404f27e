"""Rows of a text: which token is where, which document it belongs to, which target counts."""

import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import Windows, tokenizers
from xlstm_jax.data.readers import Document
from xlstm_jax.data.windows import concatenate

BYTE = tokenizers.get("byte")
EOS = BYTE.eos_id


def make(texts, seq_len):
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    return Windows(concatenate(documents, BYTE), seq_len, BYTE, {})


@pytest.fixture
def texts(rng):
    """Thirty documents of 1 to 40 bytes, any bytes."""
    return [rng.bytes(int(length)) for length in rng.integers(1, 41, 30)]


def everything(windows):
    return windows.batch(np.arange(len(windows)))


def test_every_document_is_closed_by_its_end():
    tokens = concatenate([Document("a", b"ab"), Document("b", b"c")], BYTE)
    assert tokens.tolist() == [97, 98, EOS, 99, EOS]
    assert tokens.dtype == np.uint16


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000])
def test_window_i_is_the_tokens_from_i_times_seq_len_on(texts, seq_len):
    windows = make(texts, seq_len)
    batch = everything(windows)
    for i in range(len(windows)):
        expected = windows.tokens[i * seq_len : (i + 1) * seq_len + 1]
        count = len(expected) - 1
        np.testing.assert_array_equal(batch.inputs[i, :count], expected[:-1])
        np.testing.assert_array_equal(batch.targets[i, :count], expected[1:])


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000])
def test_every_token_but_the_first_of_each_document_is_a_target_exactly_once(texts, seq_len):
    windows = make(texts, seq_len)
    batch = everything(windows)
    counted = batch.targets[batch.weights == 1]
    expected = np.concatenate([[*text[1:], EOS] for text in texts])
    np.testing.assert_array_equal(counted, expected)
    assert windows.num_targets == len(expected) == batch.weights.sum()


@pytest.mark.parametrize("seq_len", [1, 7, 64])
def test_bits_per_byte_follow_from_the_counted_bytes(texts, seq_len):
    windows = make(texts, seq_len)
    batch = everything(windows)
    num_bytes = BYTE.num_bytes(batch.targets[batch.weights == 1])
    assert windows.bytes_per_token * batch.weights.sum() == pytest.approx(num_bytes)


@pytest.mark.parametrize("seq_len", [3, 7, 64])
def test_a_change_of_segment_is_a_change_of_document_and_nothing_else(texts, seq_len):
    windows = make(texts, seq_len)
    document = np.repeat(np.arange(len(texts)), [len(text) + 1 for text in texts])
    for i in range(len(windows)):
        batch = windows.batch(np.array([i]))
        segments = batch.segment_ids[0]
        inside = document[i * seq_len : (i + 1) * seq_len]
        # The text's own last token has no target; it is a position like any other.
        np.testing.assert_array_equal(segments[: len(inside)], inside - inside[0] + 1)
        assert (segments[len(inside) :] == 0).all()


def test_the_end_of_a_document_counts_as_its_last_target_and_starts_nothing():
    batch = make([b"ab", b"c", b"d"], 4).batch(np.array([0, 1]))
    assert batch.inputs.tolist() == [[97, 98, EOS, 99], [EOS, 100, EOS, EOS]]
    assert batch.targets.tolist() == [[98, EOS, 99, EOS], [100, EOS, EOS, EOS]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2], [1, 2, 2, 0]]
    assert batch.weights.tolist() == [[1, 1, 0, 1], [0, 1, 0, 0]]
    assert batch.index.tolist() == [0, 1]


def test_a_batch_has_the_promised_types():
    batch = make([b"abc"], 2).batch(np.array([0]))
    dtypes = {name: str(leaf.dtype) for name, leaf in batch._asdict().items()}
    assert dtypes == {
        "inputs": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "weights": "float32",
        "index": "int64",
    }


@pytest.mark.parametrize("number", [-1, 2, 10**12])
def test_a_window_that_does_not_exist_is_refused(number):
    windows = make([b"abcd"], 2)
    with pytest.raises(ConfigError, match=rf"window numbers must lie in 0\.\.1 .* got {number};"):
        windows.batch(np.array([number]))
