"""Several processes as one program: who they are, and the roll-call before they begin.

JAX's own start waits for all processes, and where one never comes it ends the others with a failed
check that names nobody. So the processes first call the roll on the coordinator's port.
"""

import dataclasses
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping

import jax

from xlstm_jax.config import ConfigError

RETRY_SECONDS = 0.2
ANSWER_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Which process this is, of how many; nothing set: found out, from SLURM, MPI and the like."""

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
                "give all three, or none to have them found out."
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

    Alone, it does nothing. Found out are: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`; SLURM; and what `jax.distributed.initialize` finds out itself (Open MPI,
    Kubernetes, cloud TPUs).

    Raises:
        ConfigError: a process does not arrive in time; says which.
    """
    if jax.distributed.is_initialized():
        return
    processes = Processes() if processes is None else processes
    if processes.coordinator is None:
        found = next(filter(None, (find(os.environ) for find in _FINDERS)), None)
        if found is None:
            if any(name in os.environ for name in _FOUND_BY_JAX):
                jax.distributed.initialize()
            return
        processes = dataclasses.replace(processes, **found)
    if processes.num_processes == 1:
        return
    call_the_roll(processes)
    jax.distributed.initialize(
        processes.coordinator,
        processes.num_processes,
        processes.process_id,
        initialization_timeout=max(1, round(60 * processes.timeout_minutes)),
    )


Found = dict[str, str | int]


def _by_environment(environ: Mapping[str, str]) -> Found | None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if not all(name in environ for name in names):
        return None
    address, count, number = (environ[name] for name in names)
    return {"coordinator": address, "num_processes": int(count), "process_id": int(number)}


def _by_slurm(environ: Mapping[str, str]) -> Found | None:
    """Of a step of several tasks, one of which `srun` has started."""
    count = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if count == 1 or "SLURM_PROCID" not in environ:
        return None
    # As in "node[017-020,033]" or "a-1,a-2": the first host runs process 0.
    nodes = environ["SLURM_STEP_NODELIST"]
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} cannot be read; name the coordinator.")
    port = (
        40_000 + int(environ["SLURM_JOB_ID"]) % 20_000
    )  # jobs on one host have ports of their own
    return {
        "coordinator": f"{match[1]}{match[2] or ''}:{port}",
        "num_processes": count,
        "process_id": int(environ["SLURM_PROCID"]),
    }


_FINDERS: tuple[Callable[[Mapping[str, str]], Found | None], ...] = (_by_environment, _by_slurm)
_FOUND_BY_JAX = ("OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")


def call_the_roll(processes: Processes) -> None:
    """Returns in every process once all have arrived.

    Raises:
        ConfigError: time is up, or two say that they are the same one; names who is missing.
    """
    assert processes.coordinator and processes.num_processes is not None
    host, _, port = processes.coordinator.rpartition(":")
    deadline = time.monotonic() + 60 * processes.timeout_minutes
    if processes.process_id == 0:
        # Where only this machine can be meant, nobody else is listened to.
        inside = host == "localhost" or host.startswith("127.")
        _answer(processes, (host if inside else "", int(port)), deadline)
    else:
        _report(processes, host, int(port), deadline)


def _answer(processes: Processes, address: tuple[str, int], deadline: float) -> None:
    """Process 0: waits for the others, then tells them to go on, or what is wrong."""
    missing = set(range(1, processes.num_processes or 1))
    arrived: list[socket.socket] = []
    problem = None
    with socket.create_server(address, backlog=1024) as server:
        while missing and problem is None:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                problem = _missing(processes, missing)
                break
            connection.settimeout(ANSWER_SECONDS)
            said = _read(connection)
            if said is None:  # something else that tries ports
                connection.close()
                continue
            arrived.append(connection)
            problem = _check(processes, said, missing)
            missing.discard(said["process_id"])
        for connection in arrived:
            _finish(connection, {"problem": problem})
    if problem is not None:
        raise ConfigError(problem)


def _check(processes: Processes, said: dict[str, int], missing: set[int]) -> str | None:
    number, count = said["process_id"], said["num_processes"]
    if count != processes.num_processes:
        return (
            f"every process must be told the same num_processes, got {processes.num_processes} in "
            f"process 0 and {count} in process {number}; start them with one number."
        )
    if number not in missing:
        return f"two processes say that they are process_id={number}; give each its own."
    return None


def _missing(processes: Processes, missing: set[int]) -> str:
    names = ", ".join(map(str, sorted(missing)))
    who = f"process {names} has" if len(missing) == 1 else f"processes {names} have"
    return (
        f"{who} not arrived at {processes.coordinator} within {processes.timeout_minutes:g} minutes"
        f" (num_processes={processes.num_processes}); see their logs, or start fewer."
    )


def _report(processes: Processes, host: str, port: int, deadline: float) -> None:
    """Another process: says that it is here, and waits for the word to go on."""
    own = {"process_id": processes.process_id, "num_processes": processes.num_processes}
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ConfigError(_missing(processes, {0}))
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(json.dumps(own).encode() + b"\n")
                # Process 0 ends the wait: only it knows who else is missing.
                connection.settimeout(left + ANSWER_SECONDS)
                answer = _read(connection)
        except OSError:
            answer = None
        if answer is None:
            time.sleep(RETRY_SECONDS)
            continue
        if answer["problem"] is not None:
            raise ConfigError(answer["problem"])
        return


def _read(connection: socket.socket) -> dict | None:
    """One line of JSON; None where the other side says nothing of the kind."""
    text = b""
    try:
        while not text.endswith(b"\n"):
            piece = connection.recv(4096)
            if not piece or len(text) > 4096:
                return None
            text += piece
        return json.loads(text)
    except (ValueError, OSError):
        return None


def _finish(connection: socket.socket, answer: dict[str, str | None]) -> None:
    """Sends the answer, and lets the other side close first: the port is needed again at once."""
    with connection:
        try:
            connection.sendall(json.dumps(answer).encode() + b"\n")
            connection.recv(1)
        except OSError:
            pass
