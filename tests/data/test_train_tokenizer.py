"""Training of a byte-level BPE."""

import json
import sys

import pytest

from tests.data import tokenizer_files as make
from xlstm_jax.data import tokenizers
from xlstm_jax.data.train_tokenizer import train_bpe
from xlstm_jax.errors import ConfigError


def documents():
    """A stream, which can be read once."""
    return (line.encode() for line in make.corpus().splitlines(keepends=True))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_documents_yield_the_same_files(tmp_path):
    for name in ("a", "b"):
        train_bpe(documents(), 500, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) == {"tokenizer.json", "tokenizer_config.json"}


def test_the_tokenizer_is_lossless_and_compresses(tmp_path):
    train_bpe(documents(), 500, tmp_path)
    tokenizer = tokenizers.get(str(tmp_path))
    assert tokenizer.vocab_size == 500 and tokenizer.eos_token == "<|endoftext|>"
    ids = tokenizer.encode(make.corpus())
    assert len(ids) < 0.6 * len(make.corpus().encode())
    for text in (*make.TEXTS, "\x00\x7f\u0100\uffff\U0010ffff"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.num_bytes(tokenizer.encode(text)) == len(text.encode())


def test_no_merge_crosses_a_word(tmp_path):
    train_bpe([b"ab cd " * 100], 400, tmp_path)
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"\u0120ab", "\u0120cd"} <= set(tokens)
    assert not [token for token in tokens if "\u0120" in token[1:] and token != "<|endoftext|>"]


def test_few_documents_yield_a_smaller_vocabulary(tmp_path):
    train_bpe([b"ab"], 1000, tmp_path)
    assert tokenizers.get(str(tmp_path)).vocab_size == 258


@pytest.mark.parametrize("size", [-1, 0, 257, 1 << 31, 1 << 70])
def test_a_size_out_of_range_is_rejected(tmp_path, size):
    with pytest.raises(ConfigError, match=rf"vocab_size must be in 258\.\.2147483647, got {size};"):
        train_bpe(documents(), size, tmp_path)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "documents must have text to train a tokenizer on, got none; add some"),
        ([b"", b""], "documents must have text to train a tokenizer on, got none; add some"),
        ([b"a", b"bc\xff"], "document 2 must be UTF-8, but byte 2 is not; correct or exclude it"),
    ],
)
def test_documents_without_text_are_rejected_and_no_file_is_written(tmp_path, texts, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        train_bpe(texts, 300, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_of_the_reader_pass_unchanged(tmp_path):
    def failing():
        yield b"a"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="^the disk is gone$"):
        train_bpe(failing(), 300, tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="needs the package tokenizers, .*pip install 'xlstm-jax"):
        train_bpe(documents(), 300, tmp_path)
