"""Several real processes that train one model: stopped, killed, and resumed by more or fewer."""

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
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def config(experiment):
    """A run of eight steps on four devices, however many processes have them."""
    model = dict(pattern="mM", dim=16)
    train = dict(steps=STEPS, log_every=1, eval_every=4, checkpoint_every=3)
    cfg = experiment(data=dict(batch_size=8), model=model, **train)
    return dataclasses.replace(cfg, mesh=MeshConfig(fsdp=2, min_shard_size=2))


class Run:
    """A run of several processes in a folder of its own."""

    def __init__(self, folder: Path, cfg, compiled: Path):
        self.folder, self.cfg, self.run_dir = folder, cfg, folder / "run"
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }

    def start(self, name: str, count: int, devices=4, missing=(), minutes=2.0, **more):
        """Starts `count` processes with `devices` in all; returns them."""
        port, processes = free_port(), []
        for number in set(range(count)) - set(missing):
            told = dict(timeout_minutes=minutes)
            if count > 1:
                told |= dict(coordinator=f"127.0.0.1:{port}", num_processes=count)
                told |= dict(process_id=number)
            options = dict(
                name=name,
                run_dir=str(self.run_dir),
                config=to_dict(self.cfg),
                processes=told,
                devices=devices // count,
                **more,
            )
            command = [sys.executable, "-m", "tests.train.process", json.dumps(options)]
            pipe = subprocess.PIPE
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=self.environment, stdout=pipe, stderr=pipe, text=True
                )
            )
        return processes

    def go(self, name: str, count: int, **options):
        """Runs `count` processes to their end; returns what each says."""
        return [_said(process) for process in self.start(name, count, **options)]

    def losses(self) -> list[float]:
        records = rundir.read_metrics(self.run_dir / rundir.METRICS)
        return [record["loss"] for record in records if "loss" in record]

    def rows(self, name: str) -> list[set[int]]:
        """Rows of the data set that all processes have fed together, step by step."""
        files = self.folder.glob(f"{name}_*.jsonl")
        steps = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
        return [set().union(*step) for step in zip(*steps, strict=True)]

    def expected_rows(self, first: int, last: int) -> list[set[int]]:
        examples = loader.load(self.cfg.data, "train")
        return [
            set(loader.batch_at(examples, self.cfg.data, step).index.tolist())
            for step in range(first, last)
        ]


def _said(process, seconds=240):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def run(tmp_path, config, compiled):
    return Run(tmp_path, config, compiled)


@pytest.fixture(scope="module")
def whole(config, compiled, tmp_path_factory):
    """The run that two processes do without any interruption."""
    done = Run(tmp_path_factory.mktemp("whole"), config, compiled)
    done.go("all", 2)
    return done


SIGTERM_TO_ONE = {"process": 1, "step": 3, "signal": "SIGTERM"}


@pytest.fixture(scope="module")
def stopped(config, compiled, tmp_path_factory):
    """A run of two processes, one of which was sent a SIGTERM, and what they said at the end."""
    run = Run(tmp_path_factory.mktemp("stopped"), config, compiled)
    return run, run.go("first", 2, events=[SIGTERM_TO_ONE])


@pytest.fixture
def rest(run, stopped):
    """A copy of that run, to be resumed, and its step."""
    first, said = stopped
    shutil.copytree(first.run_dir, run.run_dir)
    return run, said[0]["step"]


def test_a_signal_to_one_process_stops_both_at_one_step(stopped, whole):
    run, (first, second) = stopped
    assert whole.rows("all") == whole.expected_rows(0, STEPS)
    assert first == second and not first["finished"] and 3 <= first["step"] < STEPS
    assert checkpoint.latest_step(run.run_dir) == first["step"]
    for number in range(2):
        log = (run.run_dir / f"process_{number}.log").read_text()
        assert f"process {number} of 2" in log and f"ends at step {first['step']} of 8" in log
    assert run.rows("first") == run.expected_rows(0, first["step"])


def test_one_process_resumes_what_two_began(rest, whole):
    run, step = rest
    (end,) = run.go("one", 1)
    assert end == {"step": STEPS, "finished": True}
    assert run.rows("one") == run.expected_rows(step, STEPS)
    np.testing.assert_allclose(run.losses(), whole.losses(), rtol=1e-5)


def test_resumed_by_as_many_processes_the_run_is_the_same_bit_for_bit(rest, whole):
    run, step = rest
    run.go("two", 2)
    assert run.losses() == whole.losses()
    assert run.rows("two") == run.expected_rows(step, STEPS)


def test_one_then_two_then_four_processes(run, whole):
    stop = {"process": 0, "signal": "SIGTERM"}
    (first,) = run.go("one", 1, events=[stop | {"step": 2}])
    second = run.go("two", 2, events=[stop | {"step": 4}])
    last = run.go("four", 4)
    assert 2 <= first["step"] < second[0]["step"] < STEPS
    assert last == [{"step": STEPS, "finished": True}] * 4
    np.testing.assert_allclose(run.losses(), whole.losses(), rtol=1e-5)
    fed = run.rows("one") + run.rows("two") + run.rows("four")
    assert fed == run.expected_rows(0, STEPS)


def test_killed_while_it_saves_a_run_goes_on_from_the_step_before(run, whole):
    """When all is written and nothing is final yet; the other process then waits in vain."""
    processes = run.start("cut", 2, killed_while_saving=6)
    processes[0].communicate(timeout=240)
    assert processes[0].returncode == -signal.SIGKILL
    processes[1].kill()
    processes[1].communicate(timeout=60)
    assert list((run.run_dir / checkpoint.FOLDER).glob("6.orbax-checkpoint-tmp*/state/*"))
    assert checkpoint.latest_step(run.run_dir) == 3
    run.go("rest", 2)
    assert run.losses() == whole.losses()
    assert run.rows("rest") == run.expected_rows(3, STEPS)


@pytest.mark.parametrize("missing", [2, 0], ids=["one", "the coordinator"])
def test_a_process_that_never_arrives_is_reported_in_one_line(run, missing):
    processes = run.start("late", 3, missing=[missing], minutes=0.15)
    for number, process in zip(sorted({0, 1, 2} - {missing}), processes, strict=True):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 4
        (line,) = err.splitlines()
        assert f"process {number} of 3 waited 0.15 minutes at 127.0.0.1:" in line
        assert "start those whose log lacks this line" in line
    assert not run.run_dir.exists()


def test_a_coordinator_whose_port_is_in_use_is_refused_in_one_sentence(run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        told = Processes(coordinator=address, num_processes=2, process_id=0)
        with pytest.raises(ConfigError, match="cannot be connected .*a free port of process 0"):
            init_distributed(told)


def test_a_process_alone_is_no_program_of_several():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
    code = "from xlstm_jax.sharding import init_distributed as i; i(); import jax; "
    code += "print(jax.process_count())"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.stdout.strip() == "1", said.stderr
