"""Windows of a text: tokens, segment ids and weights of targets."""

import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import Windows, tokenizers
from xlstm_jax.data.documents import Document
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


def all_windows(windows):
    return windows.batch(np.arange(len(windows)))


def test_every_document_ends_with_eos():
    tokens = concatenate([Document("a", b"ab"), Document("b", b"c")], BYTE)
    assert tokens.tokens.tolist() == [97, 98, EOS, 99, EOS]
    assert tokens.tokens.dtype == np.uint16 and tokens.document_ends.tolist() == [3, 5]


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000])
def test_window_i_starts_at_token_i_times_seq_len(texts, seq_len):
    windows = make(texts, seq_len)
    batch = all_windows(windows)
    for i in range(len(windows)):
        expected = windows.store.tokens[i * seq_len : (i + 1) * seq_len + 1]
        count = len(expected) - 1
        np.testing.assert_array_equal(batch.inputs[i, :count], expected[:-1])
        np.testing.assert_array_equal(batch.targets[i, :count], expected[1:])


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000])
def test_every_token_but_the_first_of_each_document_is_a_target_exactly_once(texts, seq_len):
    windows = make(texts, seq_len)
    batch = all_windows(windows)
    targets = batch.targets[batch.weights == 1]
    expected = np.concatenate([[*text[1:], EOS] for text in texts])
    np.testing.assert_array_equal(targets, expected)
    assert len(expected) == batch.weights.sum()


@pytest.mark.parametrize("seq_len", [3, 7, 64])
def test_segment_ids_change_exactly_where_documents_change(texts, seq_len):
    windows = make(texts, seq_len)
    document = np.repeat(np.arange(len(texts)), [len(text) + 1 for text in texts])
    for i in range(len(windows)):
        batch = windows.batch(np.array([i]))
        segments = batch.segment_ids[0]
        inside = document[i * seq_len : (i + 1) * seq_len]
        # The last token of the text has no target, but it is not padding.
        np.testing.assert_array_equal(segments[: len(inside)], inside - inside[0] + 1)
        assert (segments[len(inside) :] == 0).all()


def test_eos_is_the_last_target_of_a_document_and_no_target_follows_it():
    batch = make([b"ab", b"c", b"d"], 4).batch(np.array([0, 1]))
    assert batch.inputs.tolist() == [[97, 98, EOS, 99], [EOS, 100, EOS, 0]]
    assert batch.targets.tolist() == [[98, EOS, 99, EOS], [100, EOS, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2], [1, 2, 2, 0]]
    assert batch.weights.tolist() == [[1, 1, 0, 1], [0, 1, 0, 0]]
    assert batch.index.tolist() == [0, 1]


def test_a_batch_has_the_annotated_dtypes():
    batch = make([b"abc"], 2).batch(np.array([0]))
    dtypes = {name: str(leaf.dtype) for name, leaf in batch._asdict().items()}
    assert dtypes == {
        "inputs": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "weights": "float32",
        "index": "int64",
    }


@pytest.mark.parametrize("index", [-1, 2, 10**12])
def test_a_window_index_out_of_range_is_rejected(index):
    windows = make([b"abcd"], 2)
    with pytest.raises(ConfigError, match=rf"window indices must be in 0\.\.1 .* got {index};"):
        windows.batch(np.array([index]))
