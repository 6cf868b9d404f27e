"""The byte tokenizer and the table of tokenizers."""

import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import tokenizers

BYTE = tokenizers.get("byte")
TEXTS = ["", "plain", "größer, 木, 🙂", "line\r\nend\0"]
BYTES = [bytes(range(256)), b"\xff\xfe\x80", b"half a \xe6\x9c"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(text):
    ids = BYTE.encode(text)
    assert BYTE.decode(ids) == text
    assert BYTE.num_bytes(ids) == len(text.encode())


@pytest.mark.parametrize("data", BYTES)
def test_bytes_round_trip_even_if_they_are_not_utf8(data):
    assert BYTE.decode_bytes(BYTE.encode(data)) == data
    assert BYTE.decode(BYTE.encode(data)) == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("data", BYTES)
def test_a_string_with_surrogates_is_encoded_to_its_original_bytes(data):
    text = data.decode("utf-8", errors="surrogateescape")
    assert BYTE.decode_bytes(BYTE.encode(text)) == data


def test_eos_is_a_separate_id_without_text():
    assert BYTE.vocab_size == 257 and BYTE.eos_id == 256
    assert BYTE.encode(bytes(range(256))).max() < BYTE.eos_id
    assert BYTE.decode([104, BYTE.eos_id, 105]) == "hi"
    assert BYTE.num_bytes([104, BYTE.eos_id, 105]) == 2


@pytest.mark.parametrize("invalid", [-1, 257, 65536 + 104])
def test_an_id_outside_the_vocabulary_is_rejected(invalid):
    with pytest.raises(ConfigError, match=rf"ids must be in 0\.\.256 .*, got {invalid}; decode"):
        BYTE.decode(np.array([104, invalid]))


def test_an_unknown_tokenizer_is_rejected_with_the_known_names():
    with pytest.raises(ConfigError, match="tokenizer='bpe' is not known; use one of: 'byte'"):
        tokenizers.get("bpe")
