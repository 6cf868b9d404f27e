"""The lock of a run directory: one process at a time trains in it.

RUN/run.lock holds the identity of its process. The operating system holds the lock itself and
releases it when the process ends in any way, so a file that a killed process left behind does not
lock. On file systems without such locks the recorded identity decides.
"""

import contextlib
import datetime
import errno
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from xlstm_jax.config import ConfigError
from xlstm_jax.errors import quote, quote_path
from xlstm_jax.train.processes import log

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

NAME = "run.lock"

# The file system has no locks.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Within the context, no other process trains in `run_dir`, which is created if needed.

    A directory that is still empty at the end is removed again. With several processes, the first
    one holds the lock for all.

    Raises:
        ConfigError: another process holds the lock.
    """
    created = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    descriptor, problem = None, None
    if jax.process_index() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(run_dir / NAME)
        except (ConfigError, OSError) as error:
            problem = error
    # All processes end together, instead of waiting for the first one.
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(problem is not None):
        problem = problem or ConfigError(f"{run_dir / NAME} cannot be locked by process 0.")
    try:
        if problem is not None:
            raise problem
        yield
    finally:
        if descriptor is not None:
            _release(run_dir / NAME, descriptor)
        for folder in created if jax.process_index() == 0 else ():
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def may_be_locked(run_dir: Path) -> bool:
    """Whether the process that the lock records may be alive; does not take the lock."""
    try:
        descriptor = os.open(run_dir / NAME, os.O_RDONLY)
    except OSError:  # no process holds it
        return False
    try:
        owner = _read(descriptor)
    finally:
        os.close(descriptor)
    return bool(owner) and _may_run(owner)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(path, descriptor)
            if _is_at(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_identity(os.getpid())).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder has just deleted this file


def _lock(path: Path, descriptor: int) -> None:
    """Takes the lock or raises; does not wait."""
    owner, is_supported = _read(descriptor), True
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no file locks")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = False
    except BlockingIOError:
        is_locked = True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        is_supported, is_locked = False, bool(owner) and _may_run(owner)
    who = f"process {quote(owner.get('pid'))} on {quote(owner.get('host'))}"
    if not is_locked:
        if owner and owner.get("host") != platform.node():
            log.warning("%s was left behind by %s, which has ended.", path, who)
        return
    way_out = "wait for it, stop it, or use another directory"
    if not is_supported:
        way_out += f"; if that process has ended, delete {quote_path(path)}"
    raise ConfigError(
        f"run_dir={quote_path(path.parent)} must not be in use, but {who} has trained in it since "
        f"{quote(owner.get('since'))}; {way_out}."
    )


def _release(path: Path, descriptor: int) -> None:
    if _is_at(path, descriptor):  # the user may have deleted the file
        with contextlib.suppress(OSError):
            path.unlink()
    os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _identity(pid: int) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": platform.node(), "pid": pid, "process_start": _start_of(pid), "since": now}


def _read(descriptor: int) -> dict[str, Any]:
    """The recorded identity; empty if it is missing or damaged."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) and type(owner.get("pid")) is int else {}


def _may_run(owner: dict[str, Any]) -> bool:
    """Whether the recorded process may be alive; of another host that is unknown."""
    pid = owner["pid"]
    if owner.get("host") != platform.node() or os.name == "nt":  # where kill(pid, 0) kills
        return True
    try:
        os.kill(pid, 0)
    except PermissionError:  # it is alive and belongs to another user
        pass
    except (OSError, OverflowError):
        return False
    # Another start: the number belongs to a new process.
    return owner.get("process_start") in (None, _start_of(pid))


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where the system does not tell."""
    try:
        # The second field, in parentheses, may contain spaces.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
