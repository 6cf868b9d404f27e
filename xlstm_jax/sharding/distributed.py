"""Multi-process initialization: `jax.distributed` with a timeout and a one-line error message.

Failures that a user sees, observed with jax 0.10.2:

- A process does not start: after `timeout_minutes` every other process prints one line, with its
  own id and the address of the coordinator, and exits with code 4. The line cannot name the missing
  process, because JAX has no public API for it. (Without our timeout JAX aborts with a failed check
  and a C++ stack trace.)
- Two processes have the same `process_id`: JAX aborts the older one with a failed check, "Aborted
  connect attempt as there is a request from a newer incarnation"; the others time out as above.
- `num_processes` differs between processes: the value of process 0 is used. JAX aborts a process
  whose id is too large with a failed check, "Unexpected task registered".
- The port is in use: process 0 exits with one line and code 2.
- A process ends during a run: the collective operations of the others fail within a second
  (`is_peer_failure`), and they exit with one line and code 4. If it was process 0, whose
  coordination service all use, JAX may abort them first, with a failed check.
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

from xlstm_jax.config.fields import check_fields
from xlstm_jax.errors import ConfigError, quote

TIMEOUT_EXIT_CODE = 4
"""Exit code if a process did not connect in time; the same command may succeed later."""

MAX_TIMEOUT_MINUTES = 100_000
"""More than two months; much longer waits overflow the clocks of threads."""

_GRACE_SECONDS = 60  # added to JAX's timeout, so that ours, without a stack trace, expires first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Coordinator and process ids; what is None is detected from the launcher (SLURM, MPI, ...)."""

    coordinator: str | None = None  # HOST:PORT of process 0, reachable from all
    num_processes: int | None = None
    process_id: int | None = None  # counts from 0
    timeout_minutes: float = 5.0  # how long to wait for the other processes

    def __post_init__(self):
        check_fields(self, "", {"at least 1": "num_processes", "above 0": "timeout_minutes"})
        if self.timeout_minutes > MAX_TIMEOUT_MINUTES:
            raise ConfigError(
                f"timeout_minutes must be at most {MAX_TIMEOUT_MINUTES}, got "
                f"{self.timeout_minutes}; use a shorter time."
            )
        fields = [self.coordinator, self.num_processes, self.process_id]
        if None in fields and fields != [None] * 3:
            raise ConfigError(
                "coordinator, num_processes and process_id must be set together, got "
                f"{quote(self.coordinator)}, {self.num_processes} and {self.process_id}; "
                "set all three, or none to detect them."
            )
        if self.num_processes is None or self.process_id is None:
            return
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"process_id must be in 0..{self.num_processes - 1} for "
                f"num_processes={self.num_processes}, got {quote(self.process_id)}; count from 0."
            )
        if not re.fullmatch(r".+:\d+", self.coordinator or ""):
            raise ConfigError(
                f"coordinator must be HOST:PORT, got {quote(self.coordinator)}; pass the address "
                "of process 0."
            )


def init_distributed(processes: Processes | None = None) -> None:
    """Connects the processes of a program; call it before the first computation.

    Does nothing in a program of one process. The coordinator comes from `processes`, else from
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, else from a launcher that
    `jax.distributed.initialize` detects: SLURM, Open MPI, Kubernetes, cloud TPUs.

    If another process does not connect within `timeout_minutes`, this one prints one line and exits
    with code 4; it cannot raise an error while the main thread is blocked in JAX's runtime.

    Raises:
        ConfigError: the coordinator cannot be used, or none was detected.
    """
    if jax.distributed.is_initialized():
        return
    processes, environ = processes or Processes(), os.environ
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if processes.coordinator is None and all(name in environ for name in names):
        processes = dataclasses.replace(
            processes,
            coordinator=environ[names[0]],
            num_processes=_integer(environ, names[1]),
            process_id=_integer(environ, names[2]),
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
                f"jax.distributed cannot be initialized ({reason}); set coordinator, num_processes "
                "and process_id, with a free port on the host of process 0."
            ) from error


_PEER_FAILURE = re.compile(r"Gloo |NCCL |[cC]oordination ?[sS]ervice|heartbeat|[bB]arrier ")


def is_peer_failure(error: BaseException | None) -> bool:
    """Whether an error says that another process has ended, or that the network failed.

    XLA reports both by the text of the error of a collective operation only.
    """
    return jax.distributed.is_initialized() and bool(_PEER_FAILURE.search(str(error)[:2000]))


def exit_without_others(code: int) -> None:
    """Ends the process at once if it is one of several; call it after an error.

    At a regular exit JAX waits for the others, which may wait for this one in a collective
    operation.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError as error:
        raise ConfigError(
            f"the environment variable {name} must be an integer, got {quote(environ[name])}; "
            "correct it or unset it."
        ) from error


def _is_in_cluster(environ: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX detects started this process as one of several."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    markers = ("JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")
    is_multi_process = any(name in environ and _integer(environ, name) > 1 for name in counts)
    return is_multi_process or any(name in environ for name in markers)


@contextlib.contextmanager
def _time_limit(processes: Processes, seconds: int) -> Iterator[None]:
    """Exits the process with one line on stderr unless the body finishes in time."""

    def exit_process() -> None:
        name, address = "this process", ""
        if processes.coordinator is not None:
            name = f"process {processes.process_id} of {processes.num_processes}"
            address = f" at {processes.coordinator}"
        print(
            f"xlstm-jax: {name} waited {processes.timeout_minutes:g} minutes{address} for "
            "processes that did not connect; start those whose log lacks this line, or set a "
            "smaller num_processes.",
            file=sys.stderr,
            flush=True,
        )
        # sys.exit would end only this timer thread, while the main thread is blocked in C++.
        os._exit(TIMEOUT_EXIT_CODE)

    timer = threading.Timer(seconds, exit_process)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
