"""Runs: exact resume after any interruption, and errors that leave the run directory unchanged."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import chex
import jax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from xlstm_jax.config import ConfigError, to_dict
from xlstm_jax.train import CheckpointError, DivergedError, checkpoint, fit, restore_params
from xlstm_jax.train.processes import Stop

SPEED = ("step_time", "data_wait", "tokens_per_second", "tokens_per_second_per_device", "goodput")


def records(run_dir):
    """The records of a run, without metrics of speed."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in r.items() if name not in SPEED} for r in lines]


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class CrashError(Exception):
    """A simulated power failure."""


def crash_at(step):
    def callback(current, record):
        if current >= step:
            raise CrashError

    return callback


def interrupt_at(step):
    def callback(current, record):
        if current == step and "loss" in record:
            signal.raise_signal(signal.SIGINT)

    return callback


@pytest.fixture(scope="module")
def original(tiny_lm, experiment, tmp_path_factory):
    cfg, run_dir = experiment(), tmp_path_factory.mktemp("original") / "run"
    return cfg, fit(cfg, run_dir), run_dir


@pytest.fixture
def finished(original, tmp_path):
    """A config, the result of its uninterrupted run, and a copy of its run directory."""
    cfg, result, run_dir = original
    shutil.copytree(run_dir, tmp_path / "finished")
    return cfg, result, tmp_path / "finished"


def test_a_run_writes_its_files_and_learns(finished, assert_same):
    cfg, result, run_dir = finished
    assert result.finished and result.step == 12
    assert sorted(p.name for p in run_dir.iterdir()) == [
        "checkpoints", "config.json", "loss.png", "metrics.jsonl", "run.json",
    ]  # fmt: skip
    assert json.loads((run_dir / "config.json").read_text()) == to_dict(cfg)
    about = json.loads((run_dir / "run.json").read_text())
    assert about["num_params"] == sum(x.size for x in jax.tree.leaves(result.state.params))
    assert about["versions"]["jax"] == jax.__version__ and about["data"]["train"]["sha256"]
    assert checkpoint.steps(run_dir) == [5, 10, 12]
    assert_same(restore_params(run_dir)[1], result.state.params)

    train = [r for r in records(run_dir) if "loss" in r]
    valid = [r for r in records(run_dir) if "valid_loss" in r]
    assert [r["step"] for r in train] == [3, 6, 9, 12]
    assert [r["step"] for r in valid] == [4, 8, 12]
    assert [r["tokens_seen"] for r in train] == [192, 384, 576, 768]
    assert train[-1]["loss"] < train[0]["loss"]
    # One token per byte, so bits per byte are nats per token in another unit.
    assert valid[-1]["valid_bits_per_byte"] == pytest.approx(
        valid[-1]["valid_loss"] / np.log(2), rel=1e-2
    )
    assert result.evaluation == valid[-1]


@pytest.mark.parametrize("callback", [crash_at(3), crash_at(9), interrupt_at(3), interrupt_at(6)])
def test_an_interrupted_run_resumes_bit_exactly(finished, tmp_path, assert_same, callback):
    cfg, expected, run_dir = finished
    resumed_dir = tmp_path / "resumed"
    try:
        first = fit(cfg, resumed_dir, on_metrics=callback)
        # On a signal the current step finishes and is saved, and `fit` returns.
        assert not first.finished and checkpoint.latest_step(resumed_dir) == first.step < 12
        assert not (resumed_dir / "loss.png").exists()
    except CrashError:
        assert (checkpoint.latest_step(resumed_dir) or 0) < 12
    result = fit(cfg, resumed_dir)
    assert result.finished and result.evaluation == expected.evaluation
    assert_same(result.state, expected.state)
    assert records(resumed_dir) == records(run_dir)
    assert (resumed_dir / "loss.png").exists()


def test_resuming_a_finished_run_changes_nothing(finished, assert_same):
    cfg, expected, run_dir = finished
    lines = records(run_dir)
    result = fit(cfg, run_dir)
    assert result.finished and result.evaluation == expected.evaluation
    assert_same(result.state, expected.state)
    assert records(run_dir) == lines


def test_fresh_deletes_the_files_of_the_run_only(finished, with_train):
    cfg, _, run_dir = finished
    (run_dir / "notes.txt").write_text("mine")
    other = with_train(cfg, lr=2e-2, steps=3)
    assert fit(other, run_dir, fresh=True).step == 3
    assert checkpoint.steps(run_dir) == [3]
    assert [r["step"] for r in records(run_dir)] == [3, 3]
    assert (run_dir / "notes.txt").read_text() == "mine"


def test_another_config_is_rejected_with_the_fields_that_differ(finished, with_train):
    cfg, _, run_dir = finished
    before = contents(run_dir)
    other = dataclasses.replace(
        with_train(cfg, lr=2e-2), model=dataclasses.replace(cfg.model, dim=16)
    )
    with pytest.raises(ConfigError) as caught:
        fit(other, run_dir)
    message = str(caught.value)
    assert "model.dim: 16, stored 8; train.lr: 0.02, stored 0.01" in message
    assert "--fresh" in message and "\n" not in message
    assert contents(run_dir) == before


def test_fields_that_do_not_affect_results_may_differ_on_resume(finished, with_train):
    cfg, _, run_dir = finished
    other = dataclasses.replace(with_train(cfg, log_every=5, keep=9, eval_batches=1), name="b")
    assert fit(other, run_dir).finished
    assert json.loads((run_dir / "config.json").read_text()) == to_dict(other)


def test_steps_of_a_decaying_schedule_cannot_be_extended(finished, with_train):
    cfg, _, run_dir = finished
    with pytest.raises(ConfigError, match="train.steps: 20, stored 12.*Only a constant"):
        fit(with_train(cfg, steps=20), run_dir)


@pytest.mark.slow
def test_steps_of_a_constant_schedule_can_be_extended(
    tiny_lm, experiment, with_train, tmp_path, assert_same
):
    short = experiment(schedule="constant", warmup_steps=2, steps=5)
    long = with_train(short, steps=8)
    assert int(fit(short, tmp_path / "a").state.step) == 5
    extended, expected = fit(long, tmp_path / "a").state, fit(long, tmp_path / "b").state
    assert int(extended.step) == 8
    assert_same(extended, expected)


def test_any_optax_transformation_trains_and_resumes(tiny_lm, experiment, tmp_path, assert_same):
    cfg, tx = experiment(steps=4, eval_every=0, checkpoint_every=2), optax.sgd(0.1, momentum=0.9)
    with pytest.raises(CrashError):
        fit(cfg, tmp_path / "a", tx=tx, on_metrics=crash_at(3))
    result, expected = fit(cfg, tmp_path / "a", tx=tx), fit(cfg, tmp_path / "b", tx=tx)
    assert_same(result.state, expected.state)
    assert optax.tree.get(result.state.opt_state, "trace") is not None
    with pytest.raises(CheckpointError, match="must be a checkpoint of this config"):
        fit(cfg, tmp_path / "a")  # without tx


def test_changed_data_under_the_same_path_are_rejected(tiny_lm, experiment, text, tmp_path):
    shutil.copytree(text, tmp_path / "text")
    cfg, run_dir = experiment(data={"source": str(tmp_path / "text")}, steps=3), tmp_path / "run"
    fit(cfg, run_dir)
    path = tmp_path / "text" / "train" / "a.txt"
    path.write_text(path.read_text() + "more")
    before = contents(run_dir)
    with pytest.raises(ConfigError, match="was trained on other data.*sha256"):
        fit(cfg, run_dir)
    assert contents(run_dir) == before


def test_a_truncated_checkpoint_is_rejected_and_no_file_changes(finished, with_train):
    cfg, _, run_dir = finished
    victim = max(
        (p for p in (run_dir / "checkpoints" / "12").rglob("*") if p.is_file()),
        key=lambda path: path.stat().st_size,
    )
    victim.write_bytes(victim.read_bytes()[:100])
    before = contents(run_dir)
    with pytest.raises(CheckpointError, match="got 100; delete .*12 to resume from step 10"):
        fit(cfg, run_dir)
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        ({"source": "/nowhere"}, {}, "/nowhere"),
        ({"batch_size": 10_000}, {}, "batch_size=10000"),
        ({}, {"vocab_size": 100}, "model.vocab_size must be at least 257"),
    ],
)
def test_a_run_that_cannot_start_writes_nothing(tiny_lm, experiment, tmp_path, data, model, words):
    with pytest.raises(ConfigError, match=words):
        fit(experiment(data=data, model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_path_that_is_not_a_run_directory_is_rejected(tiny_lm, experiment, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be a folder"):
        fit(experiment(), tmp_path / "file")
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="must have a config.json beside its checkpoints"):
        fit(experiment(), tmp_path / "run")


def test_too_many_consecutive_skips_end_the_run(tiny_lm, experiment, tmp_path):
    cfg = experiment(steps=40, lr=1e38, warmup_steps=0, eval_every=0, checkpoint_every=0)
    run_dir = tmp_path / "run"
    with pytest.raises(DivergedError, match="8 consecutive updates were skipped from step"):
        fit(cfg, run_dir)
    dump = json.loads((run_dir / "diverged.json").read_text())
    assert len(dump["index_of_step"]) == 8
    first = dump["first_skipped_step"]
    assert dump["index_of_step"][str(first)]
    # The diverged state is not saved.
    assert checkpoint.latest_step(run_dir) is None
    assert max(r["skipped_in_a_row"] for r in records(run_dir)) >= 8


def test_checkpoint_is_saved_after_checkpoint_minutes(tiny_lm, experiment, tmp_path):
    cfg = experiment(checkpoint_every=0, checkpoint_minutes=1e-9, steps=4, keep=10)
    fit(cfg, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == [1, 2, 3, 4]


def test_console_shows_progress_and_records_contain_the_flop_rate(
    tiny_lm, experiment, tmp_path, capsys
):
    metrics = {}
    cfg = experiment(steps=6)
    fit(
        cfg,
        tmp_path / "run",
        console=True,
        flops_per_step=100.0,
        on_metrics=lambda step, record: metrics.update(record),
    )
    assert metrics["model_flops_per_second"] == pytest.approx(100.0 / metrics["step_time"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 3/6  loss") and "bits per byte" in lines[-1]


def test_compiled_programs_are_shared_by_runs(
    tiny_lm, experiment, tmp_path, compile_cache, monkeypatch
):
    monkeypatch.setenv("XLSTM_CACHE_DIR", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()

    def programs(seed):
        jax.clear_caches()
        # Programs of earlier tests are traced again: chex counts traces over all tests of a file.
        chex.clear_trace_counter()
        fit(experiment(steps=1, eval_every=0, seed=seed), tmp_path / f"run_{seed}")
        return {file.name for file in (tmp_path / "cache" / "programs").glob("*-cache")}

    try:
        first = programs(0)
        assert any("train_step" in name for name in first)
        assert programs(1) == first
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", str(compile_cache))


@pytest.fixture
def interrupts():
    """SIGINT raises KeyboardInterrupt, even if the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_requests_a_stop_and_the_second_interrupts(interrupts):
    with contextlib.closing(Stop()) as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.listen()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_stop_handles_no_signals_outside_the_main_thread():
    requested = []

    def listen():
        with contextlib.closing(Stop()) as stop:
            stop.listen()
            requested.append(stop.requested)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert requested == [False]


SCRIPT = """
    import sys
    from xlstm_jax.data import DataConfig
    from xlstm_jax.modules import LMConfig
    from xlstm_jax.train import ExperimentConfig, TrainConfig, fit

    cfg = ExperimentConfig(
        name="resumed",
        model=LMConfig(vocab_size=257, dim=16, pattern="ms", dropout=0.1),
        data=DataConfig(source="grammar", seq_len=32, batch_size=4),
        train=TrainConfig(steps=60, log_every=4, eval_every=20, eval_batches=2),
    )
    result = fit(cfg, sys.argv[1], console=True)
    print("finished" if result.finished else "stopped", result.step)
"""


@pytest.mark.slow
def test_an_interrupted_process_resumes_bit_exactly(tmp_path):
    """The library's model with dropout, in a separate process: losses are bit-identical."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = os.environ | {
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def start(name):
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(script), str(tmp_path / name)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    output, _ = finish(start("uninterrupted"))
    assert output[-1] == "finished 60"
    process, metrics = start("resumed"), tmp_path / "resumed" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    lines, errors = finish(process)
    assert lines[-1].startswith("stopped") and not errors, errors
    assert finish(start("resumed"))[0][-1] == "finished 60"
    assert records(tmp_path / "resumed") == records(tmp_path / "uninterrupted")


def finish(process):
    """Standard output and error of a process, which must exit with code 0."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out.splitlines(), err
