"""Built-in corpora. Installed texts differ between machines; only the grammar is pinned."""

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import SPLITS, DataConfig, corpora, load
from xlstm_jax.data.documents import Document

AVAILABLE = [name for name in corpora.CORPORA if any(True for _ in corpora.CORPORA[name]())]


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_corpus_is_deterministic_and_its_document_names_are_unique(name):
    documents = list(corpora.CORPORA[name]())
    assert documents == list(corpora.CORPORA[name]())
    assert len({document.name for document in documents}) == len(documents)
    assert all(document.data for document in documents)


@pytest.mark.parametrize("name", AVAILABLE)
def test_every_split_of_a_corpus_has_documents_and_a_description(name):
    loaded = {split: load(DataConfig(source=name), split) for split in SPLITS}
    for split, windows in loaded.items():
        description = windows.description
        assert description["source"] == name
        assert description["split"] == split
        assert len(description["sha256"]) == 64
        documents = description["num_documents"][split]
        # One token per byte, and one more at the end of every document.
        assert len(windows.store.tokens) == description["num_bytes"][split] + documents
        assert windows.store.tokens.dtype == "uint16"
    assert len({windows.description["sha256"] for windows in loaded.values()}) == 1


@pytest.mark.skipif("stdlib" not in AVAILABLE, reason="this Python has no library sources")
def test_stdlib_excludes_tests_and_installed_packages():
    names = [document.name for document in corpora.stdlib()]
    assert "dataclasses.py" in names and "json/decoder.py" in names
    unwanted = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not any(unwanted & set(name.split("/")) for name in names)
    assert not any("_sysconfigdata" in name for name in names)


def test_grammar_has_the_same_bytes_on_every_machine():
    description = load(DataConfig(source="grammar"), "train").description
    assert description["sha256"].startswith("8ba96728490e4efeaef831a0d1cd2633")
    assert 300_000 < sum(description["num_bytes"].values()) < 500_000


def without(monkeypatch, *missing):
    monkeypatch.setattr(
        corpora,
        "CORPORA",
        {
            name: (lambda: iter(())) if name in missing else read
            for name, read in corpora.CORPORA.items()
        },
    )


def test_missing_stdlib_is_replaced_by_the_next_corpus_with_a_warning(
    monkeypatch, caplog, tmp_path
):
    monkeypatch.setattr(corpora, "_folder", lambda: tmp_path)
    without(monkeypatch, "topics")
    windows = load(DataConfig(source="stdlib"), "train")
    assert windows.description["source"] == "unicode"
    assert "no corpus 'stdlib'; using 'unicode' instead" in caplog.text


def test_grammar_replaces_every_other_missing_corpus(monkeypatch):
    without(monkeypatch, "stdlib", "topics", "unicode", "texts")
    assert load(DataConfig(), "valid").description["source"] == "grammar"


def test_a_corpus_other_than_the_default_is_not_replaced(monkeypatch):
    without(monkeypatch, "topics")
    with pytest.raises(ConfigError, match="data.source='topics' must be part of the running Pyth"):
        load(DataConfig(source="topics"), "train")


def test_a_corpus_with_an_empty_split_is_replaced(monkeypatch):
    monkeypatch.setitem(corpora.CORPORA, "stdlib", lambda: iter([Document("one", b"text")]))
    assert load(DataConfig(), "train").description["source"] != "stdlib"
