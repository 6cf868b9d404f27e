"""Multi-process runs that are stopped, killed, and resumed with more or fewer processes."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xlstm_jax.config import ConfigError, to_dict
from xlstm_jax.data import loader
from xlstm_jax.sharding import MeshConfig, Processes, init_distributed
from xlstm_jax.train import checkpoint, rundir

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 8


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def config(experiment):
    """A run of eight steps on a mesh of four devices."""
    model = dict(pattern="mM", dim=16)
    train = dict(steps=STEPS, log_every=1, eval_every=4, checkpoint_every=3)
    train |= dict(watch="all", watch_every=4, export_every=2)
    cfg = experiment(data=dict(batch_size=8), model=model, **train)
    return dataclasses.replace(cfg, mesh=MeshConfig(fsdp=2, min_shard_size=2))


class Run:
    """A multi-process run in its own folder."""

    def __init__(self, folder: Path, cfg, compile_cache: Path):
        self.folder, self.cfg, self.run_dir = folder, cfg, folder / "run"
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(compile_cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }

    def start(self, name: str, count: int, missing=(), minutes=2.0, **options):
        """Starts the processes of a run on four devices, except for the `missing` ids."""
        coordinator, processes = f"127.0.0.1:{free_port()}", []
        for process_id in sorted(set(range(count)) - set(missing)):
            connection = dict(timeout_minutes=minutes)
            if count > 1:
                connection |= dict(coordinator=coordinator, num_processes=count)
                connection |= dict(process_id=process_id)
            arguments = dict(
                name=name,
                run_dir=str(self.run_dir),
                config=to_dict(self.cfg),
                processes=connection,
                devices=4 // count,
                **options,
            )
            command = [sys.executable, "-m", "tests.train.process", json.dumps(arguments)]
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=pipe, stderr=pipe, text=True
            )
            processes.append(process)
        return processes

    def run(self, name: str, count: int, **options):
        """Runs `count` processes to completion; returns the result of each."""
        return [_result(process) for process in self.start(name, count, **options)]

    def losses(self) -> list[float]:
        records = rundir.read_metrics(self.run_dir / rundir.METRICS)
        return [record["loss"] for record in records if "loss" in record]

    def indices(self, name: str) -> list[set[int]]:
        """The window indices of each step, loaded by all processes together."""
        files = self.folder.glob(f"{name}_*.jsonl")
        hosts = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
        return [set().union(*step) for step in zip(*hosts, strict=True)]

    def expected_indices(self, first: int, last: int) -> list[set[int]]:
        examples = loader.load(self.cfg.data, "train")
        return [
            set(loader.batch_at(examples, self.cfg.data, step).index.tolist())
            for step in range(first, last)
        ]


def _result(process, seconds=240):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def run(tmp_path, config, compile_cache):
    return Run(tmp_path, config, compile_cache)


@pytest.fixture(scope="module")
def uninterrupted(config, compile_cache, tmp_path_factory):
    """An uninterrupted run of two processes."""
    run = Run(tmp_path_factory.mktemp("uninterrupted"), config, compile_cache)
    run.run("all", 2)
    return run


SIGTERM_TO_ONE = {"process": 1, "step": 3, "signal": "SIGTERM"}


@pytest.fixture(scope="module")
def stopped(config, compile_cache, tmp_path_factory):
    """A run of two processes, stopped by a SIGTERM to one of them, and the result of each."""
    run = Run(tmp_path_factory.mktemp("stopped"), config, compile_cache)
    return run, run.run("first", 2, events=[SIGTERM_TO_ONE])


@pytest.fixture
def resumable(run, stopped):
    """A copy of the stopped run, and the step of its checkpoint."""
    original, results = stopped
    shutil.copytree(original.run_dir, run.run_dir)
    return run, results[0]["step"]


def test_sigterm_to_one_process_stops_both_at_the_same_step(stopped, uninterrupted):
    run, (first, second) = stopped
    assert uninterrupted.indices("all") == uninterrupted.expected_indices(0, STEPS)
    assert first == second and not first["finished"] and 3 <= first["step"] < STEPS
    assert checkpoint.latest_step(run.run_dir) == first["step"]
    for number in range(2):
        log = (run.run_dir / f"process_{number}.log").read_text()
        assert f"process {number} of 2" in log and f"ends at step {first['step']} of 8" in log
    assert run.indices("first") == run.expected_indices(0, first["step"])


def test_two_processes_record_statistics_and_export_all_parameters(uninterrupted):
    run_dir = uninterrupted.run_dir
    records = rundir.read_metrics(run_dir / rundir.METRICS)
    gates = {record["step"]: record["gates"] for record in records if "gates" in record}
    assert [*gates] == [4, 8] and [*gates[8]] == ["0m", "1M"]
    assert all(
        record["params"]["lm_head/kernel"]["norm"] > 0 for record in records if "gates" in record
    )
    assert sorted(path.name for path in (run_dir / "gates").iterdir()) == ["6.png", "8.png"]
    exports = {path.parent.name: path.read_text() for path in run_dir.glob("export/*/size")}
    num_params = str(json.loads((run_dir / rundir.RUN).read_text())["num_params"])
    assert exports == {"6": num_params, "8": num_params}


def test_one_process_resumes_a_run_of_two(resumable, uninterrupted):
    run, step = resumable
    (end,) = run.run("one", 1)
    assert end == {"step": STEPS, "finished": True}
    assert run.indices("one") == run.expected_indices(step, STEPS)
    np.testing.assert_allclose(run.losses(), uninterrupted.losses(), rtol=1e-5)


def test_a_run_resumed_with_the_same_number_of_processes_is_bit_exact(resumable, uninterrupted):
    run, step = resumable
    run.run("two", 2)
    assert run.losses() == uninterrupted.losses()
    assert run.indices("two") == run.expected_indices(step, STEPS)


def test_a_run_resumes_with_one_then_two_then_four_processes(run, uninterrupted):
    stop = {"process": 0, "signal": "SIGTERM"}
    (first,) = run.run("one", 1, events=[stop | {"step": 2}])
    second = run.run("two", 2, events=[stop | {"step": 4}])
    last = run.run("four", 4)
    assert 2 <= first["step"] < second[0]["step"] < STEPS
    assert last == [{"step": STEPS, "finished": True}] * 4
    np.testing.assert_allclose(run.losses(), uninterrupted.losses(), rtol=1e-5)
    indices = run.indices("one") + run.indices("two") + run.indices("four")
    assert indices == run.expected_indices(0, STEPS)


def test_a_run_killed_while_saving_resumes_from_the_previous_checkpoint(run, uninterrupted):
    """Process 0 is killed between writing the files and renaming the folder; process 1 hangs."""
    processes = run.start("killed", 2, killed_while_saving=6)
    processes[0].communicate(timeout=240)
    assert processes[0].returncode == -signal.SIGKILL
    processes[1].kill()
    processes[1].communicate(timeout=60)
    assert list((run.run_dir / checkpoint.FOLDER).glob("6.tmp/state/*"))
    assert checkpoint.latest_step(run.run_dir) == 3
    run.run("resumed", 2)
    assert run.losses() == uninterrupted.losses()
    assert run.indices("resumed") == run.expected_indices(3, STEPS)


@pytest.mark.parametrize("missing", [2, 0], ids=["worker", "coordinator"])
def test_a_missing_process_is_reported_in_one_line(run, missing):
    processes = run.start("late", 3, missing=[missing], minutes=0.15)
    for process_id, process in zip(sorted({0, 1, 2} - {missing}), processes, strict=True):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 4
        (line,) = err.splitlines()
        assert f"process {process_id} of 3 waited 0.15 minutes at 127.0.0.1:" in line
        assert "start those whose log lacks this line" in line
    assert not run.run_dir.exists()


def test_a_coordinator_port_in_use_is_a_one_line_error(run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        processes = Processes(coordinator=address, num_processes=2, process_id=0)
        with pytest.raises(
            ConfigError, match="cannot be initialized .*a free port on the host of process 0"
        ):
            init_distributed(processes)


def test_init_distributed_does_nothing_for_a_single_process():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
    code = "import jax; from xlstm_jax.sharding import init_distributed; "
    code += "init_distributed(); print(jax.process_count())"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.stdout.strip() == "1", process.stderr
