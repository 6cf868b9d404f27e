"""The command, killed at random moments, and repeated, writes the files of one that was not."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from tests.data.prepare.runs import files, write_records
from xlstm_jax.data.train_tokenizer import train_bpe

ROOT = pathlib.Path(__file__).parents[3]


def start(folder, out):
    options = ["--tokenizer", "tokenizer", "--workers", "2"]
    command = [sys.executable, "-m", "xlstm_jax", "data", "prepare", "in", out, *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL)


def children(pid):
    tasks = pathlib.Path(f"/proc/{pid}/task")
    return [child for task in tasks.glob("*/children") for child in task.read_text().split()]


def wait_for_end(workers):
    """Workers end with their parent: none may write beside those of the next command."""
    end = time.monotonic() + 5
    while alive := [pid for pid in workers if pathlib.Path("/proc", pid, "exe").exists()]:
        assert time.monotonic() < end, f"{alive} still run"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_command_killed_at_ten_moments_writes_the_same_files(tmp_path):
    rng = random.Random(0)
    words = [f"word{i} " for i in range(3000)]
    for number in range(12):
        texts = ["".join(rng.choices(words, k=300)) for _ in range(400)]
        write_records(tmp_path / f"in/{number:02}.jsonl", texts)
    train_bpe(["".join(words).encode()], 1000, tmp_path / "tokenizer")
    begin = time.monotonic()
    assert start(tmp_path, "expected").wait() == 0
    seconds = time.monotonic() - begin
    kills, finished = 0, 0
    while kills < 10:
        out = f"out{finished}"
        process = start(tmp_path, out)
        try:
            process.wait(rng.uniform(0.2, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            workers = children(process.pid)
            process.kill()
            process.wait()
            kills += 1
            wait_for_end(workers)
            entries = (tmp_path / out).glob("ledger/*.jsonl")
            for line in (line for path in entries for line in path.read_text().splitlines(True)):
                assert not line.endswith("\n") or json.loads(line)
            continue
        finished += 1  # sooner than killed: begin again
    assert start(tmp_path, out).wait() == 0
    for number in range(finished):
        assert files(tmp_path / f"out{number}") == files(tmp_path / "expected")
    assert files(tmp_path / out) == files(tmp_path / "expected")
