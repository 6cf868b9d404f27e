"""Worker processes: the same files as without them, and no hang or draft when one fails."""

import json
import multiprocessing
import signal

import pytest

from tests.data.prepare.runs import Interrupted, files, run
from xlstm_jax.config import ConfigError


def test_several_processes_write_the_same_files_as_one(source, tmp_path):
    run(source, tmp_path / "one")
    run(source, tmp_path / "three", num_workers=3)
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_a_killed_worker_ends_the_command_and_the_rest_resumes(source, tmp_path):
    out = tmp_path / "out"

    def kill(progress):
        if progress.shards == 2:
            for process in multiprocessing.active_children():
                process.kill()

    with pytest.raises(ChildProcessError, match="killed by signal 9") as caught:
        run(source, out, num_workers=2, on_progress=kill)
    assert caught.value.filename.endswith(".jsonl")
    assert not multiprocessing.active_children() and not list(out.rglob("*.tmp"))
    updates = []
    run(source, out, on_progress=updates.append)
    assert updates[0].shards >= 2
    run(source, tmp_path / "expected")
    assert files(out) == files(tmp_path / "expected")


def test_an_error_of_a_worker_is_raised_and_all_end(source, tmp_path):
    (source / "1.jsonl").write_text(json.dumps({"body": "x"}))
    with pytest.raises(ConfigError, match=r"1\.jsonl, line 1"):
        run(source, tmp_path / "out", num_workers=2)
    assert not multiprocessing.active_children()
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_workers_end_with_an_interrupt_of_their_parent(source, tmp_path):
    def interrupt(progress):
        if progress.counts.documents:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(source, tmp_path / "out", num_workers=2, on_progress=interrupt)
    assert not multiprocessing.active_children()
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
