"""Launchers of runs: this process, or a SLURM cluster."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from xlstm_jax.config import ConfigError, check_fields, import_module, read_json
from xlstm_jax.config.fields import IMPORTS
from xlstm_jax.errors import import_optional
from xlstm_jax.scaling.status import JOB, RunStatus
from xlstm_jax.sharding.distributed import init_distributed
from xlstm_jax.train import rundir

POLL_SECONDS = 5.0

Execute = Callable[[Path], RunStatus]
"""Trains the run in a folder, or resumes it: `scaling.runs.execute`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """Trains one run after the other in this process, until one is stopped by a signal."""

    on_start: Callable[[Path], None] | None = None
    on_end: Callable[[RunStatus], None] | None = None

    def launch(self, folders: Sequence[Path], execute: Execute) -> None:
        """Trains the runs in these folders."""
        for folder in folders:
            if not self.train([folder], lambda folders: [execute(folders[0])]):
                return

    def train(
        self, folders: Sequence[Path], train: Callable[[Sequence[Path]], Sequence[RunStatus]]
    ) -> bool:
        """Trains one run, or some together; returns False if a signal stopped them."""
        if self.on_start is not None:
            for folder in folders:
                self.on_start(folder)
        results = train(folders)
        if self.on_end is not None:
            for result in results:
                self.on_end(result)
        # Other runs have other shapes: compiled programs would only fill the memory.
        jax.clear_caches()
        return all(result.state != "stopped" for result in results)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
    """Submits one array of jobs, one job per run; a job may have several nodes and processes.

    A job saves a checkpoint `signal_seconds` before its time limit, or when SLURM preempts it, is
    requeued and resumes when it starts again. Needs the package submitit (`pip install
    'xlstm-jax[slurm]'`), and `out` on a file system that the nodes share.
    """

    partition: str | None = None  # None: the default of the cluster
    minutes: int = 60  # time limit of a job; a longer run continues in the requeued job
    nodes: int = 1  # of one run; its processes train together through jax.distributed
    tasks_per_node: int = 1  # processes, usually one per node, which uses all of its devices
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    mem_gb: float | None = None  # of a node
    max_running: int = 256  # jobs of the array that run at the same time
    signal_seconds: int = 90  # before the time limit: to finish a step and save
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    wait: bool = True  # until all jobs have ended; otherwise return after submission

    def __post_init__(self):
        demands = {
            "at least 1": "minutes nodes tasks_per_node cpus_per_task max_running signal_seconds",
            "at least 0": "gpus_per_node",
            "above 0": "mem_gb",
        }
        check_fields(self, "slurm.", demands)
        if self.signal_seconds >= 60 * self.minutes:
            raise ConfigError(
                f"slurm.signal_seconds must be below the time limit of {60 * self.minutes} s, got "
                f"{self.signal_seconds}; make slurm.minutes larger."
            )

    def launch(self, folders: Sequence[Path], execute: Execute) -> None:
        """Submits the runs in these folders that are not in the queue.

        Raises:
            ConfigError: submitit is not installed, or SLURM refuses the jobs.
        """
        submitit = import_optional("submitit", "the launcher of SLURM", install="xlstm-jax[slurm]")
        queued = {folder: job for folder in folders if (job := _job_of(folder))}
        states = _states(list(queued.values()))
        jobs = {folder: job for folder, job in queued.items() if job in states}
        if new := [folder for folder in folders if folder not in jobs]:
            executor = submitit.SlurmExecutor(folder=new[0].parent / "slurm")
            executor.update_parameters(**self._parameters())
            try:
                with executor.batch():
                    submitted = [
                        executor.submit(Job(str(folder.absolute()), execute)) for folder in new
                    ]
            except submitit.core.utils.FailedJobError as error:
                reason = str(error).strip().splitlines()[-1]
                raise ConfigError(
                    f"SLURM refuses the jobs ({reason}); correct the options slurm.*."
                ) from error
            for folder, job in zip(new, submitted, strict=True):
                jobs[folder] = str(job.job_id)
                rundir.write_json(folder / JOB, {"job_id": jobs[folder]})
        while self.wait and _states(list(jobs.values())):
            time.sleep(POLL_SECONDS)

    def _parameters(self) -> dict[str, Any]:
        """The options of `sbatch`, by the names of submitit."""
        options: dict[str, Any] = {
            "job_name": "xlstm-jax",
            "time": self.minutes,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "cpus_per_task": self.cpus_per_task,
            "array_parallelism": self.max_running,
            "signal_delay_s": self.signal_seconds,
            "additional_parameters": {"requeue": True},
        }
        named = {
            name: getattr(self, name) for name in ("partition", "account", "qos", "constraint")
        }
        named |= {"mem": f"{round(1024 * self.mem_gb)}M" if self.mem_gb else None}
        named |= {"gpus_per_node": self.gpus_per_node or None}
        return options | {name: value for name, value in named.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process of a job calls: trains the run in a folder, and requeues the job if needed."""

    folder: str
    execute: Execute

    def __call__(self) -> dict[str, Any]:
        """The state of the run after this job."""
        folder = Path(self.folder)
        for name in read_json(folder / rundir.CONFIG).get(IMPORTS, ()):
            import_module(name)
        init_distributed()
        with _limit_stops():
            result = self.execute(folder)
        # SLURM takes a preempted job that ends by itself for completed. A cancelled one is not
        # RUNNING any more.
        is_stopped = result.state == "stopped" and jax.process_index() == 0
        if is_stopped and _states([_own_job()]).get(_own_job()) == "RUNNING":
            _requeue()
        return result._asdict()


@contextlib.contextmanager
def _limit_stops() -> Iterator[None]:
    """Within the context, the signal before the time limit stops a run as SIGTERM does.

    Before its first step a run has nothing to save. submitit ignores a SIGTERM until then, and
    SLURM requeues a preempted job that it has to kill.
    """
    before = signal.getsignal(signal.SIGTERM)

    def stop(number, frame) -> None:
        is_alone = not jax.distributed.is_initialized()  # otherwise JAX's runtime handles SIGTERM
        if is_alone and signal.getsignal(signal.SIGTERM) == before:
            _requeue()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.signal(signal.SIGUSR2, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, previous)


def _requeue() -> None:
    """Puts the job of this process back into the queue; SLURM then ends the process."""
    subprocess.run(["scontrol", "requeue", _own_job()], check=True)


def _own_job() -> str:
    environ = os.environ
    if "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def _job_of(folder: Path) -> str | None:
    return read_json(folder / JOB)["job_id"] if (folder / JOB).exists() else None


def _states(jobs: Sequence[str]) -> dict[str, str]:
    """Job -> state, of those that are in the queue or running."""
    if not jobs:
        return {}
    command = ["squeue", "--noheader", "--array", "--format=%i %T"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"`squeue` failed ({error}); log in to a node of the cluster.") from error
    states = dict(line.split() for line in process.stdout.splitlines() if line.strip())
    return {job: states[job] for job in jobs if job in states}
