"""One process at a time trains in a run directory; a killed one does not keep it locked."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.train import lock, rundir

NO_PROCESS = 2**22 + 1  # above the largest process number of Linux


def record(**fields):
    """The contents of a lock file of this process, with some fields replaced."""
    return json.dumps(lock._identity(os.getpid()) | fields)


@pytest.fixture
def without_file_locks(monkeypatch):
    """A file system whose locks fail, as some network file systems."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def test_a_directory_is_locked_once_and_leaves_no_file_behind(tmp_path):
    run_dir = tmp_path / "a" / "run"
    with lock.hold(run_dir):
        owner = json.loads((run_dir / "run.lock").read_text())
        assert (owner["host"], owner["pid"]) == (platform.node(), os.getpid())
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on .* has trained in it"):
            lock.hold(run_dir).__enter__()
    assert not (tmp_path / "a").exists()  # as nothing was written
    with lock.hold(run_dir):
        (run_dir / "config.json").write_text("{}")
    assert [path.name for path in run_dir.iterdir()] == ["config.json"]


def test_of_threads_that_start_at_once_exactly_one_gets_the_lock(tmp_path):
    barrier, outcomes = threading.Barrier(8), []

    def start():
        barrier.wait()
        try:
            with lock.hold(tmp_path / "run"):
                barrier.wait()
                outcomes.append("locked")
        except ConfigError:
            outcomes.append("refused")
            barrier.wait()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["locked"] + ["refused"] * 7


@pytest.mark.parametrize(
    "contents",
    [record(pid=NO_PROCESS), record(), "", '{"pid":', "[]", "null", "[" * 4000, "\0" * 9],
    ids="ended reused empty torn list null deep zeros".split(),
)
def test_a_file_that_is_left_behind_does_not_lock(tmp_path, contents, caplog):
    (tmp_path / "run.lock").write_text(contents)
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not caplog.messages


def test_a_file_of_another_host_does_not_lock_and_is_named(tmp_path, caplog):
    (tmp_path / "run.lock").write_text(record(host="elsewhere", pid=7))
    with lock.hold(tmp_path):
        pass
    (message,) = caplog.messages
    assert "was left behind by process 7 on 'elsewhere'" in message


def test_without_file_locks_the_recorded_process_decides(tmp_path, without_file_locks):
    path = tmp_path / "run.lock"
    ended = [record(pid=NO_PROCESS), record(process_start=1), record(pid=2**70), "", "[]"]
    for contents in ended:  # `process_start`: the number belongs to a new process by now
        path.write_text(contents)
        with lock.hold(tmp_path):
            pass
    for contents in (record(), record(pid=1, process_start=None), record(host="elsewhere", pid=7)):
        path.write_text(contents)
        with pytest.raises(ConfigError, match=r"must not be in use.*; .*delete .*run\.lock\."):
            lock.hold(tmp_path).__enter__()
        assert path.read_text() == contents


PROCESS = """
    import sys, time
    from xlstm_jax import cli
    from xlstm_jax.train import manifest

    write = manifest.write

    def slow(folder):
        print("saves", folder.name, flush=True)
        time.sleep(120 if folder.name == sys.argv[1] + ".tmp" else 0)
        write(folder)

    manifest.write = slow
    sys.exit(cli.main(sys.argv[2:]))
"""
CONFIG = """
    from xlstm_jax.data import DataConfig
    from xlstm_jax.modules import LMConfig
    from xlstm_jax.train import ExperimentConfig, TrainConfig

    def config():
        return ExperimentConfig(
            name="small",
            model=LMConfig(vocab_size=257, dim=8, pattern="m"),
            data=DataConfig(source="grammar", seq_len=8, batch_size=2),
            train=TrainConfig(steps=6, eval_every=0, log_every=1, checkpoint_every=2),
        )
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `train` in a process whose save of step `slow` takes minutes."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "config.py").write_text(textwrap.dedent(CONFIG))
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def start(run_dir, slow="none"):
        command = [sys.executable, "-c", textwrap.dedent(PROCESS), slow]
        command += ["train", str(folder / "config.py"), "--run-dir", str(run_dir)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


def end(process):
    """The exit code and the lines on stderr."""
    _, err = process.communicate(timeout=240)
    return process.returncode, err.splitlines()


@pytest.mark.slow
def test_a_run_survives_a_second_start_a_kill_and_two_signals_while_saving(start, tmp_path):
    """Every failure is one line, and the last start writes what an uninterrupted run writes."""
    run_dir = tmp_path / "run"
    both = [start(run_dir, slow="4"), start(run_dir, slow="4")]
    while all(process.poll() is None for process in both):
        time.sleep(0.05)
    loser, winner = sorted(both, key=lambda process: process.poll() is None)
    code, (line,) = end(loser)
    assert code == 2 and f"process {winner.pid} on" in line and "must not be in use" in line

    wait_for(winner, "saves 4.tmp")
    winner.kill()
    assert end(winner)[0] == -signal.SIGKILL
    files = {path.name for path in run_dir.iterdir()}
    assert "run.lock" in files and rundir.checkpoint.steps(run_dir) == [2]

    process = start(run_dir, slow="4")
    wait_for(process, "saves 4.tmp")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for the save
    process.send_signal(signal.SIGINT)
    code, (deleted, line) = end(process)
    assert code == 130 and "deleted incomplete checkpoints in" in deleted
    assert "interrupted by SIGINT; the same command continues" in line
    assert rundir.checkpoint.steps(run_dir) == [2]

    code, (deleted,) = end(start(run_dir))
    assert code == 0 and "4.tmp" in deleted
    assert end(start(tmp_path / "uninterrupted")) == (0, [])
    losses = [
        [record["loss"] for record in rundir.read_metrics(folder / rundir.METRICS)]
        for folder in (run_dir, tmp_path / "uninterrupted")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert "run.lock" not in {path.name for path in run_dir.iterdir()}


COMPILING = """
    import jax
    from xlstm_jax.train.processes import exit_on_signal

    with exit_on_signal():
        print("computes", flush=True)
        # As in a compilation, the main thread does not return to Python.
        forever = jax.jit(lambda x: jax.lax.while_loop(lambda y: y >= 0, lambda y: y * 0.5, x))
        forever(1.0).block_until_ready()
"""


@pytest.mark.slow
def test_a_signal_ends_a_process_whose_main_thread_is_outside_python():
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(COMPILING)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, "computes")
    time.sleep(3.0)
    process.send_signal(signal.SIGTERM)
    code, (line,) = end(process)
    assert code == 143 and "interrupted by SIGTERM" in line
