"""`xlstm-jax data`: prepare, inspect and train-tokenizer, their output, errors and signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xlstm_jax.cli import data, data_progress, main
from xlstm_jax.config import user_code
from xlstm_jax.data import tokenizers
from xlstm_jax.data.shards.manifest import read_manifest


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_code, "imported", {})
    lines = [json.dumps({"text": f"text {i} " * (1 + i % 7)}) for i in range(200)]
    Path("in").mkdir()
    for name in ("a", "b"):
        Path(f"in/{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def prepare(*options):
    return main(["data", "prepare", "in", "out", "--workers", "1", *options])


def test_prepare_prints_totals_and_counts_of_each_split(capsys):
    assert prepare() == 0
    out, err = capsys.readouterr()
    splits = read_manifest("out").splits
    assert sum(info.documents for shards in splits.values() for info in shards) == 400
    assert "documents  400" in out and "2 of 2 shards" in out and "MB/s" in out
    for split, shards in splits.items():
        line = next(line for line in out.splitlines() if line.startswith(split))
        assert line.split()[1] == f"{sum(info.documents for info in shards):,}"
    assert err == ""
    assert prepare() == 0  # nothing left to do
    assert "tokens per byte" in capsys.readouterr().out


def test_prepare_prints_lines_of_progress_in_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr(data_progress, "LINE_SECONDS", 0.0)
    assert prepare() == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("0 of 2 shards, 0 of 0 MB") and "left" in lines[-1]
    assert lines[-1].startswith("2 of 2 shards") and "400 documents" in lines[-1]


def test_prepare_of_a_part_tells_what_is_missing(capsys):
    assert prepare("--shard", "1/2") == 0
    assert "not written yet: 1 shards of other processes" in capsys.readouterr().out
    assert not Path("out/manifest.json").exists()


# Command line -> part of its error.
ERRORS = {
    "data prpare": "unknown command 'data prpare'; did you mean prepare?",
    "data prepare": "`xlstm-jax data prepare` needs IN",
    "data prepare in": "`xlstm-jax data prepare` needs OUT",
    "data prepare missing out": "data.source='missing' must be",
    "data prepare in in/out": "OUT must not be within the input",
    "data prepare in in/a.jsonl": "OUT must be a folder, but in/a.jsonl is a file",
    "data prepare in out --shard 2/2": "--shard must be I/N",
    "data prepare in out --workers 0": "--workers must be at least 1, got 0",
    "data prepare in out --tokeniser x": "did you mean --tokenizer",
    "data prepare in out --tokenizer x": "tokenizer='x' is not known",
    "data prepare in out --split dev": "invalid choice 'dev' for argument '--split'",
    "data inspect missing": "data.source='missing' must be",
    "data inspect in --samples -1": "--samples must be at least 0, got -1",
    "data train-tokenizer in out": "needs --vocab-size",
    "data train-tokenizer in in/a.jsonl --vocab-size 300": "OUT must be a folder",
    "data train-tokenizer in out --vocab-size 300 --max-bytes 0": "--max-bytes must be at least 1",
}


@pytest.mark.parametrize("line, message", ERRORS.items(), ids=ERRORS)
def test_invalid_command_lines_are_one_line_errors(capsys, line, message):
    before = sorted(Path().rglob("*"))
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert sorted(Path().rglob("*")) == before


def test_data_without_a_command_lists_the_commands(capsys):
    assert main(["data"]) == 2
    assert main(["data", "--help"]) == 0
    assert "xlstm-jax data train-tokenizer --help" in capsys.readouterr().out


def test_inspect_shows_counts_lengths_and_samples_of_prepared_data(capsys):
    assert prepare() == 0
    capsys.readouterr()
    assert main(["data", "inspect", "out", "--split", "train", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    documents = sum(info.documents for info in read_manifest("out").splits["train"])
    assert "prepared" in out and "byte, 257 tokens" in out
    assert f"{documents:,}" in out and "valid" not in out
    assert "tokens of a document: median" in out and "99 %" in out
    assert "train, sample 2:\n    text " in out


def test_inspect_reads_raw_files(capsys):
    assert main(["data", "inspect", "in"]) == 0
    out = capsys.readouterr().out
    assert "bytes of a document: median" in out and "test, sample 3:\n    text " in out


def test_samples_cannot_control_the_terminal(capsys):
    Path("in/a.jsonl").write_text(json.dumps({"text": "\x1b[2Jgone\rover"}))
    assert main(["data", "inspect", "in/a.jsonl", "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[2Jgone" in out


def test_train_tokenizer_writes_a_tokenizer_of_the_training_split(capsys):
    assert main(["data", "train-tokenizer", "in", "tokenizer", "--vocab-size", "260"]) == 0
    assert "260" in capsys.readouterr().out
    assert tokenizers.get("tokenizer").decode(tokenizers.get("tokenizer").encode("hé")) == "hé"
    Path("in/a.jsonl").rename("in/test.jsonl")
    Path("in/b.jsonl").rename("in/train.jsonl")
    assert main(["data", "train-tokenizer", "in", "other", "--vocab-size", "260"]) == 0
    Path("in/test.jsonl").write_text(json.dumps({"text": "zzzz " * 1000}) + "\n")
    assert main(["data", "train-tokenizer", "in", "third", "--vocab-size", "260"]) == 0
    assert Path("third/tokenizer.json").read_bytes() == Path("other/tokenizer.json").read_bytes()


def test_train_tokenizer_reads_a_part_of_every_file(monkeypatch):
    read = []
    monkeypatch.setattr(data, "train_bpe", lambda texts, size, out: read.extend(texts))
    options = ["--vocab-size", "260", "--max-bytes"]
    assert main(["data", "train-tokenizer", "in", "out", *options, "2000"]) == 0
    part = sum(map(len, read))
    assert 1000 <= part <= 2200 and len(set(read)) < len(read)  # both files have the same lines
    assert main(["data", "train-tokenizer", "in", "out", *options, "1000000"]) == 0
    assert sum(map(len, read)) > 5 * part


def test_train_tokenizer_names_a_file_that_is_not_utf8(capsys):
    Path("bad").mkdir()
    Path("bad/train.txt").write_bytes(b"bad \xff" + b" text" * 100)
    assert main(["data", "train-tokenizer", "bad", "out", "--vocab-size", "260"]) == 2
    assert "train.txt:train must be UTF-8, but byte 4 is not" in capsys.readouterr().err


def start(*options):
    command = [sys.executable, "-m", "xlstm_jax", "data", "prepare", "big", "out", *options]
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(pattern):
    end = time.monotonic() + 60
    while not list(Path().glob(pattern)):
        assert time.monotonic() < end, f"{pattern} does not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_prepare_without_drafts_and_the_command_resumes(number):
    line = json.dumps({"text": "some text " * 50_000}) + "\n"
    Path("big").mkdir()
    Path("big/a.jsonl").write_text(line * 2)
    Path("big/b.jsonl").write_text(line * 400)
    process = start("--workers", "2")
    wait_for("out/*/00001.bin.tmp")
    os.killpg(process.pid, number)  # of the workers too, as a terminal and a scheduler do
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.count("\n") == 1 and f"interrupted by {signal.Signals(number).name}" in err
    assert "the same command resumes" in err
    assert not list(Path("out").rglob("*.tmp")) and not Path("out/manifest.json").exists()
