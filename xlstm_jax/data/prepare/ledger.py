"""The ledger of prepared data: one line for every finished shard, in a file per process."""

import contextlib
import dataclasses
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

from xlstm_jax.config.fields import from_dict, to_dict
from xlstm_jax.data.prepare.config import Share
from xlstm_jax.data.shards.manifest import ShardInfo
from xlstm_jax.errors import ConfigError, quote_path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

FOLDER = "ledger"
LOCK_SECONDS = 5.0
"""Time to wait for a lock: workers of a killed process release theirs after milliseconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished input shard."""

    number: int
    files: tuple[tuple[str, int], ...]  # names and sizes
    shards: dict[str, ShardInfo]  # by split; none for a split without documents
    settings: dict[str, Any]  # must equal those of the other entries


class Ledger(contextlib.AbstractContextManager):
    """The file of one process, locked while it is open: two processes never write one shard.

    Raises:
        ConfigError: a process with the same share, or one with another number of shares, runs.
    """

    def __init__(self, out: Path, share: Share):
        path = out / FOLDER / f"{share.index}-of-{share.count}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")
        try:
            _lock(path, self._file.fileno())
            # With another number of shares, shards are distributed in another way.
            check_unused(out, but=f"-of-{share.count}.jsonl")
            # Remove a line that a killed process wrote in part.
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)
        except BaseException:
            self._file.close()
            raise

    def append(self, entry: Entry) -> None:
        """Adds a line that survives a crash of the machine."""
        self._file.write(json.dumps(to_dict(entry)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, *error: object) -> None:
        self._file.close()


def check_unused(out: Path, but: str = "no suffix") -> None:
    """Raises ConfigError if a process has locked a ledger file without the suffix `but`."""
    for path in (path for path in _paths(out) if not path.name.endswith(but)):
        with open(path, "rb") as file:
            _lock(path, file.fileno(), shared=True)


def _paths(out: Path) -> list[Path]:
    return sorted((out / FOLDER).glob("*.jsonl"))


def _lock(path: Path, descriptor: int, *, shared: bool = False) -> None:
    if fcntl is None:
        return
    kind, end = fcntl.LOCK_SH if shared else fcntl.LOCK_EX, time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return  # the file system has no locks
            if time.monotonic() > end:
                raise ConfigError(
                    f"{quote_path(path)} is in use by another process that prepares this data; "
                    "wait until it ends, or stop it."
                ) from None
        time.sleep(0.05)


def read_entries(out: Path) -> dict[int, Entry]:
    """The finished shards of all processes, by number; an incomplete last line is skipped.

    Raises:
        ConfigError: another line is not an entry.
    """
    entries = {}
    for path in _paths(out):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                entry = from_dict(Entry, json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{quote_path(path)}:{number} must be an entry of the ledger ({error}); delete "
                    "the line, and its shard is prepared again."
                ) from error
            entries[entry.number] = entry
    return entries
