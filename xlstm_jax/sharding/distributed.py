"""Several processes as one program: `jax.distributed` with a time limit in plain words.

What a user sees where the processes do not match, tried with jax 0.10.2:

- A process that does not start: after `timeout_minutes` every other one prints one line, with its
  own number and the coordinator's address, and ends with exit code 4. Missing is whoever printed no
  such line: JAX's coordination service knows who it is, but has no public option that tells. (By
  itself JAX would end with a failed check and a C++ stack trace.)
- Two processes with one `process_id`: JAX ends the older one with a failed check, "Aborted connect
  attempt as there is a request from a newer incarnation"; the others end as above.
- Different `num_processes`: that of process 0 counts for all of them. A process whose number is not
  below it ends with a failed check, "Unexpected task registered".
- A port in use: process 0 ends with one line and exit code 2.
"""

import contextlib
import dataclasses
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from xlstm_jax.config import ConfigError

MISSING = 4
"""Exit code where a process did not arrive in time; the same command may succeed later."""

_GRACE_SECONDS = 60  # JAX's own limit comes later than ours: it ends a process with a stack trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Which process this is, of how many; nothing set: detected, from SLURM, MPI and the like."""

    coordinator: str | None = None  # HOST:PORT of process 0, where the others can reach it
    num_processes: int | None = None
    process_id: int | None = None  # from 0
    timeout_minutes: float = 5.0  # to wait for the others

    def __post_init__(self):
        given = [self.coordinator, self.num_processes, self.process_id]
        if None in given and given != [None] * 3:
            raise ConfigError(
                "coordinator, num_processes and process_id belong together, got "
                f"{self.coordinator!r}, {self.num_processes} and {self.process_id}; "
                "give all three, or none to have them detected."
            )
        if self.num_processes is None or self.process_id is None:
            return
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"process_id must lie in 0..{self.num_processes - 1} for "
                f"num_processes={self.num_processes}, got {self.process_id}."
            )
        if not re.fullmatch(r".+:\d+", self.coordinator or ""):
            raise ConfigError(f"coordinator must be HOST:PORT, got {self.coordinator!r}.")


def init_distributed(processes: Processes | None = None) -> None:
    """Joins the other processes of this program; call it before the first computation.

    Alone, it does nothing. `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`
    count where `processes` names nobody; then what `jax.distributed.initialize` detects: SLURM,
    Open MPI, Kubernetes, cloud TPUs.

    Where another process does not arrive within `timeout_minutes`, this one prints one line and
    ends with exit code 4; nothing that waits in JAX's runtime could be interrupted otherwise.

    Raises:
        ConfigError: the coordinator cannot be used, or none was detected.
    """
    if jax.distributed.is_initialized():
        return
    processes, environ = processes or Processes(), os.environ
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if processes.coordinator is None and all(name in environ for name in names):
        address, count, number = (environ[name] for name in names)
        processes = dataclasses.replace(
            processes, coordinator=address, num_processes=int(count), process_id=int(number)
        )
    arguments: dict[str, Any] = {}
    if processes.coordinator is not None:
        arguments = {
            "coordinator_address": processes.coordinator,
            "num_processes": processes.num_processes,
            "process_id": processes.process_id,
        }
        if re.match(r"(localhost|127\.[\d.]+):", processes.coordinator):
            arguments["coordinator_bind_address"] = processes.coordinator  # no other interface
    elif not _is_in_cluster(environ):
        return
    if processes.num_processes == 1:
        return
    seconds = max(1, round(60 * processes.timeout_minutes))
    with _time_limit(processes, seconds):
        try:
            jax.distributed.initialize(**arguments, initialization_timeout=seconds + _GRACE_SECONDS)
        except (ValueError, RuntimeError) as error:  # a port in use, a launcher without an address
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"the processes of this program cannot be connected ({reason}); give coordinator, "
                "num_processes and process_id, with a free port of process 0."
            ) from error


def _is_in_cluster(environ: Mapping[str, str]) -> bool:
    """Whether a launcher whose variables JAX reads has started this process as one of several."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    several = any(int(environ.get(name, "1")) > 1 for name in counts)
    return several or "JOB_COMPLETION_INDEX" in environ or "TPU_WORKER_HOSTNAMES" in environ


@contextlib.contextmanager
def _time_limit(processes: Processes, seconds: int) -> Iterator[None]:
    """Ends the process, with one line on stderr, unless what is inside returns in time."""

    def end() -> None:
        who, where = "this process", ""
        if processes.coordinator is not None:
            who = f"process {processes.process_id} of {processes.num_processes}"
            where = f" at {processes.coordinator}"
        print(
            f"xlstm-jax: {who} waited {processes.timeout_minutes:g} minutes{where} for processes "
            "that did not arrive; start those whose log lacks this line, or give a smaller "
            "num_processes.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(MISSING)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
