"""Launchers: runs on a real SLURM cluster of one node, preempted, requeued and cancelled."""

import contextlib
import json
import os
import signal
import subprocess

import jax
import numpy as np
import pytest

from tests.scaling import cluster
from tests.scaling.sweeps import sweep, xlstm
from xlstm_jax.config import ConfigError, user_code
from xlstm_jax.scaling import Local, Shape, Slurm, collect, launch, plan, run
from xlstm_jax.scaling.status import RunStatus
from xlstm_jax.train import restore_params, rundir
from xlstm_jax.train.processes import Stop


def _losses(folder):
    return [r["loss"] for r in rundir.read_metrics(folder / "metrics.jsonl") if "loss" in r]


def _from_step(folder):
    return json.loads((folder / "run.json").read_text())["from_step"]


def _find_repository(monkeypatch):
    """Lets jobs import this repository."""
    paths = [os.getcwd(), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.mark.slow
def test_preempted_requeued_and_cancelled_runs_resume_bit_for_bit(
    tmp_path, monkeypatch, one_device
):
    cluster.skip_without_slurm()
    pytest.importorskip("submitit")
    shapes = [Shape(16, 1, 2), Shape(24, 1, 2)]
    specs = plan(sweep(families={"xlstm": xlstm}, shapes=shapes, budgets=[1.2e10]))
    out, folders = tmp_path / "slurm", [tmp_path / "slurm" / spec.run_id for spec in specs]
    _find_repository(monkeypatch)
    monkeypatch.setattr(user_code, "imported", {"tests.scaling.pace": None})
    with cluster.cluster(monkeypatch):
        states = run(specs, out, launcher=Slurm(minutes=10, partition="low", wait=False))
        assert [one.state for one in states] == ["planned"] * 2
        jobs = [json.loads((folder / "job.json").read_text())["job_id"] for folder in folders]
        # Repeating the command does not submit the jobs again.
        run(specs, out, launcher=Slurm(minutes=10, wait=False))
        assert len(cluster.output("squeue", "--noheader", "--array").splitlines()) == 2

        cluster.wait("the first run trains", lambda: _losses(folders[0]))
        command = ["sbatch", "--partition=high", "--output=/dev/null", "--wrap=sleep 1"]
        subprocess.run(command, check=True, capture_output=True)
        cluster.wait("the first run is preempted", lambda: cluster.state(jobs[0]) == "PENDING")

        # The signal that SLURM sends before the time limit, then a cancellation.
        cluster.wait("the second run trains", lambda: _losses(folders[1]))
        subprocess.run(["scancel", "--signal=USR2", jobs[1]], check=True)
        cluster.wait("the second run is requeued", lambda: cluster.state(jobs[1]) == "PENDING")
        cluster.start_now(jobs[1])
        cluster.wait("the second run resumes", lambda: _from_step(folders[1]))
        known = len(_losses(folders[1]))
        cluster.wait("the second run goes on", lambda: len(_losses(folders[1])) > known)
        subprocess.run(["scancel", jobs[1]], check=True)
        cluster.wait("the second job ends", lambda: not cluster.state(jobs[1]))

        cluster.start_now(jobs[0])
        cluster.wait("the first run ends", (folders[0] / "result.json").exists)
        assert 0 < _from_step(folders[0]) < specs[0].cfg.train.steps
        table = collect(out)
        assert [one.state for one in table.unfinished] == ["stopped"] and len(table.records) == 1

        monkeypatch.setattr(launch, "POLL_SECONDS", 0.5)
        states = run(specs, out, launcher=Slurm(minutes=10))
        assert [one.state for one in states] == ["finished"] * 2

    run(specs, tmp_path / "local", launcher=Local())
    records = [collect(folder).records for folder in (out, tmp_path / "local")]
    for interrupted, straight in zip(*records, strict=True):
        seconds = {"train_seconds": straight["train_seconds"]}
        assert interrupted | seconds == straight
    for spec, folder in zip(specs, folders, strict=True):
        other = tmp_path / "local" / spec.run_id
        assert _losses(folder) == _losses(other)
        params = [restore_params(path)[1] for path in (folder, other)]
        jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.slow
def test_processes_of_a_job_train_a_run_together(tmp_path, monkeypatch):
    cluster.skip_without_slurm()
    pytest.importorskip("submitit")
    specs = plan(sweep(families={"xlstm": xlstm}, shapes=[Shape(16, 1, 2)], budgets=[1e9]))
    _find_repository(monkeypatch)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.5)
    with cluster.cluster(monkeypatch):
        (one,) = run(specs, tmp_path, launcher=Slurm(minutes=10, tasks_per_node=2))
    logs = sorted(path.name for path in (tmp_path / one.run_id).glob("process_*.log"))
    assert (one.state, logs) == ("finished", ["process_0.log", "process_1.log"])
    assert len(json.loads((tmp_path / one.run_id / "run.json").read_text())["devices"]) == 2


@pytest.fixture
def requeued(monkeypatch):
    """The commands that put a job back into the queue; `states` has the jobs in it."""
    commands = []
    monkeypatch.setattr(launch.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(launch, "_states", lambda jobs: {"9": "RUNNING", "7_3": "RUNNING"})
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    return commands


def _job(tmp_path, execute):
    (tmp_path / "config.json").write_text("{}")
    return launch.Job(str(tmp_path), execute)


def _stopped_by(number):
    """Stands for a run that a signal stops."""

    def execute(folder):
        with contextlib.closing(Stop()) as stop:
            stop.listen()
            os.kill(os.getpid(), number)
            return RunStatus(folder.name, "name", "stopped" if stop.requested else "planned")

    return execute


def test_job_is_requeued_if_its_limit_comes_before_the_first_step(tmp_path, requeued):
    def execute(folder):
        os.kill(os.getpid(), signal.SIGUSR2)
        return RunStatus(folder.name, "name", "planned")

    _job(tmp_path, execute)()
    assert requeued == [["scontrol", "requeue", "9"]]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_job_is_requeued_after_a_signal_stopped_the_run(tmp_path, requeued, monkeypatch, number):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert _job(tmp_path, _stopped_by(number))()["state"] == "stopped"
    assert requeued == [["scontrol", "requeue", "7_3"]]


def test_cancelled_job_is_not_requeued(tmp_path, requeued, monkeypatch):
    monkeypatch.setattr(launch, "_states", lambda jobs: {"9": "COMPLETING"})
    assert _job(tmp_path, _stopped_by(signal.SIGTERM))()["state"] == "stopped"
    assert requeued == []


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_job_that_ends_is_not_requeued(tmp_path, requeued, state):
    _job(tmp_path, lambda folder: RunStatus(folder.name, "name", state))()
    assert requeued == []


def test_options_of_slurm_become_those_of_sbatch():
    slurm = Slurm(
        partition="p", minutes=30, nodes=4, gpus_per_node=8, mem_gb=1.5, constraint="h100"
    )
    assert slurm._parameters() == {
        "job_name": "xlstm-jax",
        "time": 30,
        "nodes": 4,
        "ntasks_per_node": 1,
        "cpus_per_task": 1,
        "array_parallelism": 256,
        "signal_delay_s": 90,
        "additional_parameters": {"requeue": True},
        "partition": "p",
        "constraint": "h100",
        "mem": "1536M",
        "gpus_per_node": 8,
    }


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(nodes=0), "slurm.nodes must be at least 1, got 0"),
        (dict(minutes=1), "slurm.signal_seconds must be below the time limit of 60 s, got 90"),
    ],
)
def test_invalid_options_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Slurm(**fields)


def test_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"needs the package submitit, .*'xlstm-jax\[slurm\]'"):
        run(plan(sweep(budgets=[1e9]))[:1], tmp_path, launcher=Slurm())
