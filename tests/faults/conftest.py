"""Runs that are killed, starved and damaged, and the table of what happened to them."""

import dataclasses
import datetime
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from xlstm_jax.config import to_dict
from xlstm_jax.data import DataConfig
from xlstm_jax.modules import LargeConfig, LMConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig, checkpoint, rundir

ROOT = Path(__file__).parents[2]
SECONDS = 240  # of a process, on a machine that also does other work
SPEED = ("step_time", "data_wait", "goodput")


def pytest_addoption(parser):
    parser.addoption("--faults-table", help="write the tries of the fault suite to FILE.json, .md")


@dataclasses.dataclass(frozen=True)
class Try:
    """One fault and what came of it."""

    kind: str
    where: str  # the phase, file or operation that it hit
    outcome: str  # "resumed, equal", or the exit code and the first words of the line
    steps_lost: int | None = None  # steps that were repeated
    seed: int | None = None  # repeats it: make test-faults ARGS="-k 'kills and SEED'"


@pytest.fixture(scope="session")
def tries(request):
    """The table of tries; written at the end of the session if --faults-table is given."""
    table: list[Try] = []
    yield table
    if path := request.config.getoption("--faults-table"):
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} CPUs, {platform.platform()}",
            "versions": rundir.versions(),
            "tries": [dataclasses.asdict(one) for one in table],
        }
        Path(path).with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
        Path(path).with_suffix(".md").write_text(_markdown(table))


def _markdown(table):
    """One line per kind of fault."""
    lines = [
        "| fault | tries | where | steps lost, mean and most | outcome |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(one.kind for one in table):
        tries = [one for one in table if one.kind == kind]
        lost = [one.steps_lost for one in tries if one.steps_lost is not None]
        words = f"{np.mean(lost):.1f}, {max(lost)}" if lost else "-"
        where, outcomes = (_counted(getattr(one, x) for one in tries) for x in ("where", "outcome"))
        lines.append(f"| {kind} | {len(tries)} | {where} | {words} | {outcomes} |")
    return "\n".join(lines) + "\n"


def _counted(values):
    values = list(values)
    counts = {value: values.count(value) for value in values}
    return "; ".join(value + (f" ({n})" if n > 1 else "") for value, n in counts.items())


class Child:
    """A process that trains; its phases arrive while it runs."""

    def __init__(self, options, environment):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.faults.child", json.dumps(options)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.phases: list[tuple[str, int]] = []
        self._queue: queue.Queue = queue.Queue()
        self._lines = {"stdout": [], "stderr": []}
        # Threads, so that a full pipe cannot block the process.
        self._threads = [
            threading.Thread(target=self._read, args=(name,), daemon=True) for name in self._lines
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, name):
        with getattr(self.process, name) as pipe:
            for line in pipe:
                if line.startswith("{"):
                    (event,) = json.loads(line).items()
                    self.phases.append(event)
                    self._queue.put(event)
                else:
                    self._lines[name].append(line.rstrip("\n"))
        if name == "stdout":
            self._queue.put(None)

    def wait_for(self, phase, count=1):
        """Waits for the `count`-th event of a phase; returns its step, or None at the end."""
        deadline = time.monotonic() + SECONDS
        while count and (event := self._queue.get(timeout=deadline - time.monotonic())):
            count -= event[0] == phase
        return None if count else event[1]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)

    def finish(self, seconds=SECONDS):
        """Waits for the end; returns the exit code and the lines of stderr."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            for thread in self._threads:
                thread.join(10)
        return code, self._lines["stderr"]

    @property
    def steps(self):
        """The number of the last step that began, plus one."""
        return max((step + 1 for phase, step in self.phases if phase == "step"), default=0)


class Run:
    """A run directory with its config."""

    def __init__(self, folder, cfg, environment):
        self.folder, self.cfg, self.environment = folder, cfg, environment
        self.run_dir = folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "config.json"
        self.config.write_text(json.dumps(to_dict(cfg)))

    def start(self, *argv, **options):
        argv = ["train", str(self.config), "--run-dir", str(self.run_dir), *argv]
        return Child(dict(argv=argv, **options), self.environment)

    def command(self, *argv, **options):
        """Runs another command; returns its exit code and the lines of stderr."""
        return Child(dict(argv=argv, **options), self.environment).finish()

    def to_end(self, *argv, **options):
        """Trains to the last step; nothing may be printed on stderr but our own warnings."""
        child = self.start(*argv, **options)
        code, errors = child.finish()
        assert code == 0 and all(line.startswith("xlstm-jax: ") for line in errors), errors
        return errors

    def fails(self, code, *words, **options):
        """Trains until it ends with `code` and one line, which it returns."""
        child = self.start(**options)
        actual, errors = child.finish()
        assert actual == code and len(errors) == 1, (actual, errors)
        assert errors[0].startswith("xlstm-jax: ") and all(w in errors[0] for w in words), errors
        return errors[0]

    @property
    def saved(self):
        return checkpoint.latest_step(self.run_dir) or 0

    def records(self):
        """The records, without metrics of speed."""
        records = rundir.read_metrics(self.run_dir / rundir.METRICS)
        return [
            {k: v for k, v in record.items() if k not in SPEED and "per_second" not in k}
            for record in records
        ]

    def exports(self):
        """The files of all exports, complete or not, and their contents."""
        files = (self.run_dir / rundir.EXPORT).rglob("*")
        return {str(x.relative_to(self.run_dir)): x.read_bytes() for x in files if x.is_file()}


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of all children: one cache of compiled programs, so that a restart compiles nothing."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLSTM_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with a small text."""
    rng, root = np.random.default_rng(1), tmp_path_factory.mktemp("text")
    for split, count in (("train", 3000), ("valid", 300)):
        (root / split).mkdir()
        words = rng.choice(["state ", "gate ", "memory ", "scan\n"], count)
        (root / split / "a.txt").write_text("".join(words))
    return root


@pytest.fixture(scope="session")
def cfg(text):
    """A run of forty steps with dropout that saves every seven and evaluates every ten."""
    return ExperimentConfig(
        name="faults",
        model=LMConfig(vocab_size=257, dim=8, pattern="m", dropout=0.1),
        data=DataConfig(source=str(text), seq_len=16, batch_size=4),
        train=TrainConfig(
            steps=40, lr=1e-2, log_every=3, eval_every=10, eval_batches=2, checkpoint_every=7
        ),
    )


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, cfg, environment):
    """Makes runs; keywords replace fields of `TrainConfig`, `data` those of `DataConfig`."""

    def make(data=(), model=None, **train):
        changed = dataclasses.replace(
            cfg,
            model=model or cfg.model,
            train=dataclasses.replace(cfg.train, **train),
            data=dataclasses.replace(cfg.data, **dict(data)),
        )
        return Run(tmp_path_factory.mktemp("run"), changed, environment)

    return make


@pytest.fixture(scope="session")
def unbroken(make_run):
    """A run that nothing happens to."""
    run = make_run()
    run.to_end()
    return run


@pytest.fixture(scope="session")
def make_exporting_run(make_run):
    """Makes runs of a model that transformers has; each checkpoint is exported."""
    large = LargeConfig(num_heads=1, ffn_dim=8)
    model = LMConfig(
        vocab_size=257, dim=8, pattern="M", large=large, final_norm="rms", final_norm_eps=1e-6
    )
    return lambda: make_run(model=model, export_every=1)


@pytest.fixture
def copy(make_run, unbroken):
    """A copy of the unbroken run."""
    run = make_run()
    shutil.copytree(unbroken.run_dir, run.run_dir)
    return run
