"""Multi-process initialization: `jax.distributed` with a timeout and a one-line error message.

Failures that a user sees, observed with jax 0.10.2:

- A process does not start: after `timeout_minutes` every other process prints one line, with its
  own id and the address of the coordinator, and exits with code 4. The missing process is the one
  whose log lacks this line: JAX's coordination service has its id but no public API to read it.
- Two processes have the same `process_id`: JAX aborts the older one with a failed check, "Aborted
  connect attempt as there is a request from a newer incarnation"; the others time out as above.
- `num_processes` differs: the value of process 0 applies to all. A process whose id is not below it
  aborts with a failed check, "Unexpected task registered".
- The port is in use: process 0 exits with one line and code 2.
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

TIMEOUT_EXIT_CODE = 4
"""Exit code if a process did not connect in time; the same command may succeed later."""

_GRACE_SECONDS = 60  # added to JAX's own timeout, so that ours, without a stack trace, is first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The id of this process and the number of all; unset, both are detected (SLURM, MPI, ...)."""

    coordinator: str | None = None  # HOST:PORT of process 0, reachable from all others
    num_processes: int | None = None
    process_id: int | None = None  # counts from 0
    timeout_minutes: float = 5.0  # how long to wait for the other processes

    def __post_init__(self):
        fields = [self.coordinator, self.num_processes, self.process_id]
        if None in fields and fields != [None] * 3:
            raise ConfigError(
                "coordinator, num_processes and process_id must be set together, got "
                f"{self.coordinator!r}, {self.num_processes} and {self.process_id}; "
                "set all three, or none to detect them."
            )
        if self.num_processes is None or self.process_id is None:
            return
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"process_id must be in 0..{self.num_processes - 1} for "
                f"num_processes={self.num_processes}, got {self.process_id}; count from 0."
            )
        if not re.fullmatch(r".+:\d+", self.coordinator or ""):
            raise ConfigError(
                f"coordinator must be HOST:PORT, got {self.coordinator!r}; pass the address of "
                "process 0."
            )


def init_distributed(processes: Processes | None = None) -> None:
    """Connects the processes of a program; call it before the first computation.

    A single process does nothing. The addresses come from `processes`, else from the variables
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, else from the launchers
    that `jax.distributed.initialize` detects: SLURM, Open MPI, Kubernetes, cloud TPUs.

    If another process does not connect within `timeout_minutes`, this process prints one line and
    exits with code 4, since a call that waits in JAX's runtime cannot be interrupted.

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
            arguments["coordinator_bind_address"] = processes.coordinator  # not on all interfaces
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
                f"the processes of this program cannot be connected ({reason}); set coordinator, "
                "num_processes and process_id, with a free port of process 0."
            ) from error


def _is_in_cluster(environ: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX detects has started this process as one of several."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    several = any(int(environ.get(name, "1")) > 1 for name in counts)
    return several or "JOB_COMPLETION_INDEX" in environ or "TPU_WORKER_HOSTNAMES" in environ


@contextlib.contextmanager
def _time_limit(processes: Processes, seconds: int) -> Iterator[None]:
    """Ends the process, with one line on stderr, unless the body finishes in time."""

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
        # Not sys.exit: it would end this timer thread alone, while the main thread waits in C++.
        os._exit(TIMEOUT_EXIT_CODE)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
