"""Tokens by path: prepared data and what they are verified for, Megatron-LM and datatrove."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from tests.data.shards.formats import (
    assert_holds,
    documents,
    write_datatrove,
    write_megatron,
    write_prepared,
)
from xlstm_jax.config import ConfigError
from xlstm_jax.data.shards import open as opening
from xlstm_jax.data.shards import verify
from xlstm_jax.data.shards.manifest import token_dtype
from xlstm_jax.data.shards.open import kind_of


def open_tokens(path, split="train", **options):
    return opening.open_tokens(str(path), split, block_len=64, max_blocks=4, **options)


@pytest.fixture
def docs(rng):
    return documents(rng, 60)


@pytest.fixture
def prepared(docs, tmp_path):
    """Forty documents of train in three shards, twenty of valid."""
    folder = tmp_path / "prepared"
    shards = [docs[:10], docs[10:11], docs[11:40]]
    write_prepared(folder, {"train": shards, "valid": [docs[40:]]})
    return folder


def test_prepared_data_hold_the_documents_of_each_split(prepared, docs):
    assert kind_of(str(prepared)) == "prepared"
    for split, expected in {"train": docs[:40], "valid": docs[40:], "all": docs}.items():
        opened = open_tokens(prepared, split)
        assert_holds(opened.store, expected)
        assert opened.num_bytes == sum(len(doc) - 1 for doc in expected)
        assert opened.tokenizer is not None and opened.tokenizer_path is None
        assert opened.store.loss_mask(0, 3) is None


def test_ids_above_16_bits_and_loss_masks_are_read(tmp_path, rng):
    docs = documents(rng, 20, vocab_size=100_000)
    write_prepared(
        tmp_path, {"train": [docs[:7], docs[7:]]}, 100_000, loss_mask=True, name="tokenizer.json"
    )
    opened = open_tokens(tmp_path)
    assert_holds(opened.store, docs)
    tokens = np.concatenate(docs)
    np.testing.assert_array_equal(opened.store.loss_mask(0, len(tokens)), tokens % 2 == 0)
    assert opened.tokenizer_path == f"{tmp_path}/tokenizer"


@pytest.mark.parametrize("vocab_size", [2, 257, 65_535, 65_536, 65_537, 1 << 20])
def test_the_dtype_of_tokens_has_every_id(vocab_size):
    assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1


def test_a_store_in_another_process_reads_the_same(prepared, docs):
    store = open_tokens(prepared).store
    store.read(0, 10)
    copy = pickle.dumps(store)
    assert len(copy) < 5000  # paths, no tokens
    assert_holds(pickle.loads(copy), docs[:40])


def test_description_depends_on_content_and_not_on_the_path(prepared, tmp_path, docs):
    descriptions = [open_tokens(prepared, split).description for split in ("train", "valid")]
    assert descriptions[0] != descriptions[1]
    json.dumps(descriptions)
    moved = tmp_path / "moved"
    shutil.move(prepared, moved)
    assert open_tokens(f"{moved}/").description == descriptions[0]
    write_prepared(tmp_path / "other", {"train": [docs[:39] + docs[40:41]]})
    assert open_tokens(tmp_path / "other").description["content_sha256"] not in {
        description["content_sha256"] for description in descriptions
    }


def test_a_path_may_begin_with_the_home_directory(prepared, monkeypatch, docs):
    monkeypatch.setenv("HOME", str(prepared.parent))
    assert_holds(open_tokens("~/prepared").store, docs[:40])


def test_an_absent_split_is_an_error_that_names_the_others(prepared):
    with pytest.raises(ConfigError, match="split='test'.*40 in train, 20 in valid.*data prepare"):
        open_tokens(prepared, "test")


def test_an_unfinished_preparation_is_an_error(prepared):
    (prepared / "manifest.json").unlink()
    assert kind_of(str(prepared)) == "prepared"
    with pytest.raises(ConfigError, match="manifest.json does not exist.*not finished"):
        open_tokens(prepared)


def test_other_folders_are_not_tokenized_data(tmp_path):
    (tmp_path / "manifest.json").write_text('{"manifest_version": 3, "name": "an extension"}')
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "train").mkdir()
    for path in (tmp_path, tmp_path / "text.txt", tmp_path / "absent", "a\0b", "a" * 5000):
        assert kind_of(str(path)) is None
    with pytest.raises(ConfigError, match="must be a folder of `xlstm-jax data prepare`"):
        open_tokens(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".ends"])
@pytest.mark.parametrize("mode", ["size", "full", "auto"])
def test_a_file_of_another_size_is_an_error_that_names_it(prepared, suffix, mode):
    path = prepared / "train" / f"00002{suffix}"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=rf"train/00002\{suffix} must have"):
        open_tokens(prepared, verify=mode)
    path.unlink()
    with pytest.raises(ConfigError, match=rf"train/00002\{suffix} must have .* is absent"):
        open_tokens(prepared, verify=mode)


def test_the_checksum_detects_a_changed_byte(prepared, monkeypatch, docs):
    path = prepared / "train" / "00001.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    for mode in ("full", "auto"):
        with pytest.raises(ConfigError, match="train/00001.bin must have the SHA-256"):
            open_tokens(prepared, verify=mode)
    open_tokens(prepared, verify="size")
    open_tokens(prepared, "valid", verify="full")  # another split
    monkeypatch.setattr(verify, "MAX_AUTO", 10)
    open_tokens(prepared, verify="auto")


def test_long_verification_reports_its_progress(prepared, monkeypatch, caplog):
    monkeypatch.setattr(verify, "_LOG_SECONDS", -1.0)
    with caplog.at_level("INFO"):
        open_tokens(prepared, verify="full")
    assert "verified 0.0 of 0.0 GB" in caplog.text


def test_a_shard_whose_last_document_has_no_end_is_an_error(prepared):
    path = prepared / "train" / "00000.ends"
    path.write_bytes(np.append(np.fromfile(path, "<u8")[:-1], 3).astype("<u8").tobytes())
    with pytest.raises(ConfigError, match="last document of .*00000.ends must end at token"):
        open_tokens(prepared, verify="size")


@pytest.mark.parametrize("change", [lambda e: e[::-1], lambda e: e * 0, lambda e: e << 40])
def test_ends_that_do_not_increase_are_an_error(prepared, change):
    path = prepared / "train" / "00002.ends"
    ends = np.fromfile(path, "<u8")
    path.write_bytes(np.append(change(ends[:-1]), ends[-1:]).astype("<u8").tobytes())
    with pytest.raises(ConfigError, match="ends of documents in .*00002.ends must increase"):
        open_tokens(prepared, verify="size")


MEGATRON = {"uint8": "|u1", "uint16": "<u2", "int32": "<i4"}


@pytest.mark.parametrize("dtype", MEGATRON)
@pytest.mark.parametrize("sequences", [1, 3])
def test_megatron_documents_end_where_the_index_says(tmp_path, rng, dtype, sequences):
    docs = documents(rng, 50, {"uint8": 256, "uint16": 60_000, "int32": 100_000}[dtype])
    write_megatron(tmp_path / "corpus_text_document", docs, MEGATRON[dtype], sequences)
    for suffix in ("", ".bin", ".idx"):
        path = f"{tmp_path}/corpus_text_document{suffix}"
        assert kind_of(path) == "megatron"
        opened = open_tokens(path, "all")
        assert_holds(opened.store, docs)
        assert opened[1:4] == (None, None, None)
    assert opened.description["format"] == "megatron"


def test_documents_without_tokens_are_dropped(tmp_path, rng):
    docs = documents(rng, 20)
    docs = [docs[0], docs[0][:0], docs[0][:0], *docs[1:], docs[0][:0]]
    write_megatron(tmp_path / "a", docs)
    write_datatrove(tmp_path / "b.ds", docs)
    for name in ("a", "b.ds"):
        assert_holds(open_tokens(tmp_path / name, "all").store, [doc for doc in docs if len(doc)])


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("metadata", ["gpt2|{item}\n{count}\n1 T", "", "gpt2\n{count}"])
def test_datatrove_documents_end_where_the_index_says(tmp_path, rng, item, metadata):
    docs = documents(rng, 50, 60_000 if item == 2 else 100_000)
    if item == 4 and metadata.startswith("gpt2\n"):
        metadata = ""  # files without a size have tokens of two bytes
    write_datatrove(tmp_path / "a.ds", docs[:30], item, metadata=metadata)
    write_datatrove(tmp_path / "b.ds", docs[30:], item, metadata=metadata, loss_mask=True)
    assert kind_of(str(tmp_path)) == kind_of(f"{tmp_path}/a.ds") == "datatrove"
    assert_holds(open_tokens(f"{tmp_path}/a.ds", "all").store, docs[:30])
    store = open_tokens(tmp_path, "all").store
    assert_holds(store, docs)
    second = np.concatenate(docs[30:])
    mask = store.loss_mask(0, store.num_tokens)
    np.testing.assert_array_equal(mask[-len(second) :], second % 2 == 0)
    assert mask[: -len(second)].all()


def test_data_that_name_no_split_are_divided_by_documents(tmp_path, rng):
    docs = documents(rng, 60)
    write_datatrove(tmp_path / "a.ds", docs[:58])
    write_datatrove(tmp_path / "b.ds", docs[58:])
    stores = {split: open_tokens(tmp_path, split).store for split in ("train", "valid", "test")}
    assert_holds(stores["train"], docs[:54])
    assert_holds(pickle.loads(pickle.dumps(stores["valid"])), docs[54:57])
    assert_holds(stores["test"], docs[57:])
    with pytest.raises(ConfigError, match="positions must be in"):  # of the next split
        stores["valid"].read(0, stores["valid"].num_tokens + 1)
    write_megatron(tmp_path / "two", docs[:2])
    with pytest.raises(ConfigError, match="split='valid'.*2 in all"):
        open_tokens(tmp_path / "two", "valid")


@pytest.mark.parametrize("write", [write_datatrove, write_megatron])
@pytest.mark.parametrize("names", ["train.ds test.ds", "train/a.ds test/b.ds"])
def test_splits_of_folders_and_names_are_honored(tmp_path, rng, write, names):
    docs, paths = documents(rng, 40), [tmp_path / name for name in names.split()]
    if write is write_megatron:
        paths = [path.with_suffix("") for path in paths]
    for path, part in zip(paths, (docs[:30], docs[30:]), strict=True):
        path.parent.mkdir(exist_ok=True)
        write(path, part)
    assert_holds(open_tokens(tmp_path, "train").store, docs[:30])
    assert_holds(open_tokens(tmp_path, "test").store, docs[30:])
    assert_holds(open_tokens(tmp_path, "all").store, docs)
    with pytest.raises(ConfigError, match="split='valid', but has 1 in train, 1 in test"):
        open_tokens(tmp_path, "valid")


def test_files_of_several_tokenizers_are_an_error(tmp_path, rng):
    docs = documents(rng, 10)
    write_datatrove(tmp_path / "a.ds", docs)
    write_datatrove(tmp_path / "b.ds", docs, 4)
    with pytest.raises(ConfigError, match="tokens of one size"):
        open_tokens(tmp_path)


@pytest.mark.parametrize("name", ["a.idx", "a.bin", "b.ds", "b.ds.index", "b.ds.metadata"])
def test_a_truncated_file_is_an_error_that_names_its_data(tmp_path, rng, name):
    docs = documents(rng, 10)
    write_megatron(tmp_path / "a", docs)
    write_datatrove(tmp_path / "b.ds", docs, 4)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(ConfigError, match=rf"{tmp_path}/{name[0]}"):
        open_tokens(tmp_path / ("a" if name[0] == "a" else "b.ds"))


def test_the_index_of_another_file_is_an_error(tmp_path, rng):
    docs = documents(rng, 10)
    write_megatron(tmp_path / "a", docs)
    write_datatrove(tmp_path / "b.ds", docs)
    write_megatron(tmp_path / "c", docs[:5])
    write_datatrove(tmp_path / "d.ds", docs[:5])
    os.replace(tmp_path / "c.idx", tmp_path / "a.idx")
    os.replace(tmp_path / "d.ds.index", tmp_path / "b.ds.index")
    for name, match in {"a": "bytes of tokens", "b.ds": "bytes per token"}.items():
        with pytest.raises(ConfigError, match=match):
            open_tokens(tmp_path / name)


@pytest.mark.parametrize("name", ["a.idx", "b.ds.index", "b.ds.loss", "b.ds", "a.bin"])
def test_a_file_with_more_bytes_than_its_index_says_is_an_error(tmp_path, rng, name):
    docs = documents(rng, 10)
    write_megatron(tmp_path / "a", docs)
    write_datatrove(tmp_path / "b.ds", docs, loss_mask=True)
    path = tmp_path / name
    path.write_bytes(path.read_bytes() + bytes(8))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/{name[0]}"):
        open_tokens(tmp_path / ("a" if name[0] == "a" else "b.ds"), "all")


def test_sequences_of_negative_length_are_an_error(tmp_path):
    docs = [np.arange(9), np.arange(5), np.arange(7)]
    write_megatron(tmp_path / "a", docs)
    path = tmp_path / "a.idx"
    data = bytearray(path.read_bytes())
    lengths, offsets = np.frombuffer(data, "<i4", 3, 34), np.frombuffer(data, "<i8", 3, 46)
    lengths[:], offsets[:] = [9, -5, 17], [0, 18, 8]  # they follow each other, with the right sum
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="must follow each other"):
        open_tokens(tmp_path / "a", "all")
