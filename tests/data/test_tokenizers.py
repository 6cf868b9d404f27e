"""Bytes to ids and back."""

import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import tokenizers

BYTE = tokenizers.get("byte")
TEXTS = ["", "plain", "größer, 木, 🙂", "line\r\nend\0"]
BYTES = [bytes(range(256)), b"\xff\xfe\x80", b"half a \xe6\x9c"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(text):
    ids = BYTE.encode(text)
    assert BYTE.decode(ids) == text
    assert BYTE.num_bytes(ids) == len(text.encode())


@pytest.mark.parametrize("data", BYTES)
def test_bytes_come_back_even_where_they_are_not_utf8(data):
    assert BYTE.decode_bytes(BYTE.encode(data)) == data
    assert BYTE.decode(BYTE.encode(data)) == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("data", BYTES)
def test_a_string_read_with_surrogates_gives_back_its_bytes(data):
    text = data.decode("utf-8", errors="surrogateescape")
    assert BYTE.decode_bytes(BYTE.encode(text)) == data


def test_the_end_of_a_document_is_an_id_of_its_own_and_no_text():
    assert BYTE.vocab_size == 257 and BYTE.eos_id == 256
    assert BYTE.encode(bytes(range(256))).max() < BYTE.eos_id
    assert BYTE.decode([104, BYTE.eos_id, 105]) == "hi"
    assert BYTE.num_bytes([104, BYTE.eos_id, 105]) == 2


@pytest.mark.parametrize("strange", [-1, 257, 65536 + 104])
def test_an_id_outside_the_vocabulary_is_refused(strange):
    with pytest.raises(ConfigError, match=rf"ids must lie in 0\.\.256 .*, got {strange}; decode"):
        BYTE.decode(np.array([104, strange]))


def test_an_unknown_tokenizer_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match="tokenizer='bpe' is not known; use one of: 'byte'"):
        tokenizers.get("bpe")
