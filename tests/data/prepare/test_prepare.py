"""Prepared shards: their contents, resuming, shares, settings and errors."""

import threading

import numpy as np
import pytest

from tests.data.prepare.runs import Interrupted, files, run, write_records
from xlstm_jax.config import ConfigError
from xlstm_jax.data import tokenizers
from xlstm_jax.data.documents import document, find_files, read
from xlstm_jax.data.prepare import folder, inputs, ledger
from xlstm_jax.data.prepare.config import Share
from xlstm_jax.data.shards.manifest import read_manifest
from xlstm_jax.data.shards.open import open_tokens

TOKENIZER = tokenizers.get("byte")


def texts(out, split):
    store = open_tokens(str(out), split, block_len=256, max_blocks=1).store
    ends = store.ends(0, store.num_tokens)
    bounds = zip([0, *ends], ends, strict=False)
    tokens = [store.read(int(start), int(stop)) for start, stop in bounds]
    for ids in tokens:  # the end-of-document token is the last one, and no other
        assert np.flatnonzero(ids == TOKENIZER.eos_id).tolist() == [len(ids) - 1]
    return [TOKENIZER.decode(ids) for ids in tokens]


def test_every_split_holds_its_documents_in_order(source, tmp_path):
    run(source, tmp_path / "out")
    expected = {"train": [], "valid": [], "test": []}
    for file in find_files(str(source)):
        for split, doc in read(file):
            expected[split].append(doc.data.decode())
    assert {split: texts(tmp_path / "out", split) for split in expected} == expected


def test_the_manifest_counts_documents_tokens_and_bytes(source, tmp_path):
    updates = []
    manifest = run(source, tmp_path / "out", on_progress=updates.append).manifest
    assert manifest == read_manifest(str(tmp_path / "out"))
    infos = [info for shards in manifest.splits.values() for info in shards]
    assert sum(info.documents for info in infos) == 300
    num_bytes = sum(len(doc.data) for file in find_files(str(source)) for _, doc in read(file))
    assert sum(info.num_bytes for info in infos) == num_bytes
    assert sum(info.tokens for info in infos) == num_bytes + 300
    assert updates[-1].counts == (300, num_bytes + 300, num_bytes)
    assert [info.name for info in manifest.splits["train"]] == [f"{n:05d}" for n in range(5)]


def test_a_single_file_is_a_source(source, tmp_path):
    run(source / "3.jsonl", tmp_path / "out", split="valid")
    assert texts(tmp_path / "out", "valid") == [f"3 text {i} ü" for i in range(60)]
    assert sorted(read_manifest(str(tmp_path / "out")).splits) == ["valid"]


def test_small_text_files_share_a_shard_and_files_of_records_do_not(source, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_GROUP", 100)
    for number in range(4):
        (source / f"a{number}.txt").write_text("x" * 40)
    (source / "4a.txt").write_text("x" * 300)
    groups = [[f.name for f in s.files] for s in inputs.input_shards(find_files(str(source)))]
    records = [[f"{n}.jsonl"] for n in range(5)]
    assert groups == [*records, ["4a.txt"], ["a0.txt", "a1.txt"], ["a2.txt", "a3.txt"]]


def test_a_text_in_pieces_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "MAX_PIECE", 1000)
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(text)
    run(tmp_path / "in", tmp_path / "out", split="train")
    assert texts(tmp_path / "out", "train") == [text]


def test_documents_longer_and_shorter_than_a_batch_keep_their_order(source, tmp_path, monkeypatch):
    run(source, tmp_path / "a")
    monkeypatch.setattr("xlstm_jax.data.prepare.encode.BATCH_BYTES", 40)
    run(source, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def stop_at(update):
    """A function that raises when it is called for the `update`-th time."""
    calls = iter(range(update - 1))

    def on_progress(progress):
        if next(calls, None) is None:
            raise Interrupted

    return on_progress


def test_a_preparation_that_stops_anywhere_resumes_to_the_same_files(source, tmp_path):
    run(source, tmp_path / "expected")
    for update in range(1, 10):
        out = tmp_path / str(update)
        with pytest.raises(Interrupted):
            run(source, out, on_progress=stop_at(update))
        assert not (out / "manifest.json").exists() and not list(out.rglob("*.tmp"))
        run(source, out)
        assert files(out) == files(tmp_path / "expected")


def test_finished_shards_are_skipped(source, tmp_path):
    with pytest.raises(Interrupted):
        run(source, tmp_path / "out", on_progress=stop_at(6))  # two updates for each shard
    updates = []
    run(source, tmp_path / "out", on_progress=updates.append)
    assert [updates[0].shards, updates[-1].shards] == [2, 5]
    assert updates[-1].counts.documents == 180
    again = []
    run(source, tmp_path / "out", on_progress=again.append)
    assert [progress.shards for progress in again] == [5]


def test_progress_reaches_the_size_of_the_input(source, tmp_path):
    updates = []
    run(source, tmp_path / "out", on_progress=updates.append)
    sizes = [progress.size for progress in updates]
    total = sum(path.stat().st_size for path in source.iterdir())
    assert sizes == sorted(sizes) and sizes[-1] == updates[0].total_size == total


def test_a_finished_shard_without_its_file_is_prepared_again(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    before = files(out)
    (out / "train/00002.bin").unlink()
    (out / "train/00003.ends").write_bytes(b"short")
    run(source, out)
    assert files(out) == before


def test_drafts_of_a_killed_process_are_overwritten(source, tmp_path):
    out = tmp_path / "out"
    run(source, tmp_path / "expected")
    for split in ("train", "valid", "test"):
        (out / split).mkdir(parents=True)
        for suffix in (".bin.tmp", ".ends.tmp", ".bin"):
            (out / split / f"00001{suffix}").write_bytes(b"incomplete" * 10_000)
    run(source, out)
    assert files(out) == files(tmp_path / "expected")


def test_an_incomplete_last_line_of_the_ledger_is_ignored(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    before = files(out)
    path = out / "ledger/0-of-1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for tail in (lines[4][:-20], lines[4][:-1], b"\0" * 50):
        (out / "manifest.json").unlink()
        path.write_bytes(b"".join(lines[:4]) + tail)
        run(source, out)
        assert files(out) == before
        assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"number": "x"}', "[" * 100_000])
def test_a_damaged_line_of_the_ledger_is_an_error_with_its_number(source, tmp_path, line):
    run(source, tmp_path / "out")
    path = tmp_path / "out/ledger/0-of-1.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=r"0-of-1\.jsonl:6 must be an entry of the ledger"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_process_that_finishes_the_last_shard_writes_the_manifest(source, tmp_path, order):
    run(source, tmp_path / "expected")
    results = [run(source, tmp_path / "out", shard=f"{index}/3") for index in order]
    assert [result.manifest is None for result in results] == [True, True, False]
    assert [result.missing for result in results][2] == 0 < results[0].missing
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_another_number_of_processes_resumes(source, tmp_path):
    run(source, tmp_path / "expected")
    run(source, tmp_path / "out", shard="1/4")
    updates = []
    run(source, tmp_path / "out", on_progress=updates.append)
    assert updates[0].shards == 1
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_more_processes_than_shards_have_nothing_to_do(source, tmp_path):
    run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", shard="7/9").missing == 0


class Saved(tokenizers.ByteTokenizer):
    """A tokenizer with a file."""

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_processes_that_finish_at_once_write_the_same_manifest(source, tmp_path):
    manifest = run(source, tmp_path / "out").manifest
    expected = (tmp_path / "out/manifest.json").read_bytes()
    (tmp_path / "out/manifest.json").unlink()
    tokenizer, failures = Saved(), []

    def write(index):
        try:
            for _ in range(20):
                folder.write_manifest(tmp_path / "out", manifest, tokenizer, Share(index, 4))
                assert (tmp_path / "out/manifest.json").read_bytes() == expected
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not list((tmp_path / "out").glob("*.tmp"))
    assert (tmp_path / "out/tokenizer/tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"split": "train"}, "split was None and is 'train'"),
        ({"text_field": "body"}, "text_field was 'text' and is 'body'"),
        ({"pattern": "*.jsonl"}, "pattern was None"),
        ({"tokenizer": "other"}, "tokenizer_sha256 was"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_than_before_are_refused(source, tmp_path, change, message, monkeypatch):
    monkeypatch.setitem(tokenizers.TOKENIZERS, "other", Saved(sha256="1" * 64))
    run(source, tmp_path / "out", shard="0/2")
    before = files(tmp_path / "out", with_ledger=True)
    with pytest.raises(ConfigError, match=f"prepared in another way: .*{message}.*--fresh"):
        run(source, tmp_path / "out", **change)
    assert files(tmp_path / "out", with_ledger=True) == before


def test_other_input_files_than_before_are_refused(source, tmp_path):
    run(source, tmp_path / "out")
    write_records(source / "9.jsonl", ["new"])
    with pytest.raises(ConfigError, match="files_sha256 was"):
        run(source, tmp_path / "out")


def test_a_moved_source_is_the_same(source, tmp_path):
    run(source, tmp_path / "out")
    source.rename(tmp_path / "moved")
    assert run(tmp_path / "moved", tmp_path / "out").manifest is not None


def test_a_manifest_without_a_ledger_is_not_overwritten(source, tmp_path):
    run(source, tmp_path / "out")
    (tmp_path / "out/ledger/0-of-1.jsonl").unlink()
    with pytest.raises(ConfigError, match="no ledger"):
        run(source, tmp_path / "out")


def test_fresh_replaces_prepared_data(source, tmp_path):
    run(source, tmp_path / "out", split="train")
    run(source, tmp_path / "expected", split="valid")
    run(source, tmp_path / "out", split="valid", fresh=True)
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert not (tmp_path / "out/train").exists()


def test_fresh_deletes_nothing_if_the_input_is_invalid(source, tmp_path):
    run(source, tmp_path / "out")
    before = files(tmp_path / "out", with_ledger=True)
    for options in ({"tokenizer": "unknown"}, {"pattern": "*.csv"}, {"shard": "0/2"}):
        with pytest.raises(ConfigError):
            run(source, tmp_path / "out", fresh=True, **options)
    assert files(tmp_path / "out", with_ledger=True) == before


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "name", ["a.txt", "train/a.txt", "train/00000.bin.gz", "other/00000.bin", "tokenizer/a/b"]
)
def test_a_folder_with_other_files_is_refused(source, tmp_path, name, fresh):
    run(source, tmp_path / "out")
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = files(tmp_path / "out", with_ledger=True)
    with pytest.raises(ConfigError, match=f"but .* has {name}"):
        run(source, tmp_path / "out", fresh=fresh)
    assert files(tmp_path / "out", with_ledger=True) == before


def test_fresh_refuses_shards_that_are_not_known_to_be_prepared_data(source, tmp_path):
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/00000.bin").write_bytes(b"of another tool")
    with pytest.raises(ConfigError, match="neither manifest.json nor ledger/"):
        run(source, tmp_path / "out", fresh=True)
    assert files(tmp_path / "out") == {"train/00000.bin": b"of another tool"}


def test_an_output_within_the_input_is_refused(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "out", tmp_path / "link/out"):
        with pytest.raises(ConfigError, match="OUT must not be within the input"):
            run(source, out)
    assert sorted(path.name for path in source.iterdir()) == [f"{n}.jsonl" for n in range(5)]


def test_an_output_that_is_a_file_or_a_url_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="is a file"):
        run(source, source / "0.jsonl")
    with pytest.raises(ConfigError, match="must be a local folder"):
        run(source, type(tmp_path)("s3://bucket/out"))


@pytest.mark.parametrize("shard", ["1", "1/1", "-1/2", "0/0", "a/b", "0/2/3", "1/2 "])
def test_an_invalid_share_is_refused(source, tmp_path, shard):
    with pytest.raises(ConfigError, match="--shard must be I/N"):
        run(source, tmp_path / "out", shard=shard)
    assert not (tmp_path / "out").exists()


def test_two_processes_with_the_same_share_are_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.1)
    with ledger.Ledger(tmp_path / "out", Share(0, 2)):
        for options in ({"shard": "0/2"}, {}):  # the same, and another distribution of shards
            with pytest.raises(ConfigError, match="0-of-2.jsonl is in use by another process"):
                run(source, tmp_path / "out", **options)
        assert run(source, tmp_path / "out", shard="1/2").missing == 3
    run(source, tmp_path / "out", shard="0/2")


def test_an_invalid_record_stops_before_the_manifest_and_keeps_finished_shards(source, tmp_path):
    text = (source / "3.jsonl").read_text()
    (source / "3.jsonl").write_text(text + '{"body": "x"}\n')
    with pytest.raises(ConfigError, match=r"3\.jsonl, line 61, must have the field 'text'"):
        run(source, tmp_path / "out")
    out = tmp_path / "out"
    assert len((out / "ledger/0-of-1.jsonl").read_text().splitlines()) == 3
    assert not (out / "manifest.json").exists() and not list(out.rglob("*.tmp"))
    assert not (out / "train/00003.bin").exists()


def test_input_without_text_is_refused(tmp_path):
    write_records(tmp_path / "in/a.jsonl", [""] * 3)
    with pytest.raises(ConfigError, match="contains no text"):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


class Failing(Saved):
    def encode_batch(self, texts):
        if any(b"4 text 7 " in text for text in texts):
            raise IndexError("no such symbol")
        return super().encode_batch(texts)


def test_a_tokenizer_that_fails_names_the_document(source, tmp_path, monkeypatch):
    monkeypatch.setitem(tokenizers.TOKENIZERS, "failing", Failing())
    with pytest.raises(ConfigError, match=r"4\.jsonl:8 cannot be tokenized .IndexError: no such"):
        run(source, tmp_path / "out", tokenizer="failing")
    assert not list((tmp_path / "out").rglob("*.tmp"))


class TooLarge(Saved):
    def encode_batch(self, texts):
        return [np.full(3, 300, np.uint16) for _ in texts]


def test_ids_beyond_the_vocabulary_are_refused(source, tmp_path, monkeypatch):
    monkeypatch.setitem(tokenizers.TOKENIZERS, "large", TooLarge())
    with pytest.raises(ConfigError, match="ids below its vocab_size=257, got 300"):
        run(source, tmp_path / "out", tokenizer="large")


class Wide(Saved):
    def encode_batch(self, texts):
        return [np.full(len(text), 65_536, np.uint32) for text in texts]


def test_a_large_vocabulary_is_stored_in_four_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setitem(tokenizers.TOKENIZERS, "wide", Wide(vocab_size=70_000, eos_id=69_999))
    manifest = run(source, tmp_path / "out", tokenizer="wide", split="train").manifest
    tokens = np.fromfile(tmp_path / "out/train/00000.bin", "<u4")
    assert manifest.dtype == "uint32" and set(tokens) == {65_536, 69_999}


def test_tokens_are_no_input(source, tmp_path):
    run(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="IN must be raw text, but .* has tokens already"):
        run(tmp_path / "out", tmp_path / "again")
