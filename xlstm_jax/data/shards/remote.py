"""Files by path or URL: sizes, contents, and ranges of remote files."""

import dataclasses
import functools
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Integer

from xlstm_jax.data.shards.columns import Column
from xlstm_jax.errors import ConfigError, quote, quote_path

_log = logging.getLogger(__name__)

DELAYS = (0.5, 1.0, 4.0)
"""Seconds between attempts of a request."""

PART = 1 << 22
"""Bytes of a file that are read at once."""

_THREADS = 16  # of requests for many small files


def is_url(path: str) -> bool:
    """Whether a path is a URL for `fsspec`, such as s3://bucket/data."""
    return "://" in path


def shown(path: str) -> str:
    """A path or URL for a message: without what may be a password or a signature."""
    if is_url(path):
        path = re.sub(r"(?<=://)[^/@]*@", "", path.partition("?")[0])
    return quote_path(path)


def request(url: str, method: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of the file system of a URL, again after errors that may pass.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: another error, after several attempts.
    """
    from fsspec.core import url_to_fs  # imported here, as it is slow

    try:
        filesystem, path = url_to_fs(url)
    except (ImportError, ValueError) as error:  # no such protocol, or its package is absent
        raise ConfigError(
            f"{shown(url)} cannot be opened ({quote(str(error))}); install the fsspec package of "
            "its protocol (s3fs, gcsfs, aiohttp, ...), or copy the data to a local folder."
        ) from error
    for delay in (*DELAYS, None):
        try:
            return getattr(filesystem, method)(path, *args, **kwargs)
        except Exception as error:  # of any client library
            cause = _cause(error)
            if isinstance(cause, (FileNotFoundError, NotADirectoryError)):
                raise FileNotFoundError(f"{shown(url)} does not exist") from error
            if delay is None or isinstance(cause, PermissionError):
                # Without the URL, which may have a signature.
                reason = f"{type(cause).__name__}: {cause}".replace(url, "URL")
                raise ConfigError(
                    f"{shown(url)} cannot be read ({quote(reason)}); check the address, the "
                    "network and your credentials."
                ) from error
            _log.info("%s: %s; trying again", shown(url), type(cause).__name__)
            time.sleep(delay)


def _cause(error: Exception) -> BaseException:
    """The error itself, or that of the network which `fsspec` reports as an absent file (HTTP)."""
    cause = error.__cause__
    is_network = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    if not isinstance(error, FileNotFoundError) or cause is None or not is_network:
        return error
    status = getattr(cause, "status", 0)
    # 4xx also means that the file does not exist, except for 408 and 429, which ask to retry.
    return error if 400 <= status < 500 and status not in (408, 429) else cause


def file_size(path: str) -> int | None:
    """The bytes of a file; None if it does not exist."""
    try:
        if is_url(path):
            info = request(path, "info")
            return info["size"] if info["type"] == "file" else None
        return os.path.getsize(path) if os.path.isfile(path) else None
    except FileNotFoundError:
        return None


def file_sizes(paths: Iterable[str]) -> list[int | None]:
    """The bytes of many files."""
    paths = list(paths)
    return in_threads(file_size, paths, is_remote=any(map(is_url, paths)))


def in_threads(
    function: Callable[[Any], Any], arguments: Sequence[Any], *, is_remote: bool
) -> list[Any]:
    """A function of each argument; in several threads if it waits for the network."""
    if not is_remote:
        return list(map(function, arguments))
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, arguments))


def list_files(folder: str) -> list[str]:
    """The sorted names of the files in a folder, hidden ones excluded; [] if it does not exist."""
    try:
        if is_url(folder):
            entries = request(folder, "ls", detail=True)
            names = [e["name"].rsplit("/", 1)[-1] for e in entries if e["type"] == "file"]
        elif os.path.isdir(folder):  # False, too, for names that cannot exist
            names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
        else:
            return []
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if not name.startswith("."))


def read_bytes(path: str, limit: int) -> bytes:
    """The contents of a file of at most `limit` bytes.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: it is larger, or cannot be read.
    """
    size = file_size(path)
    if size is None:
        raise FileNotFoundError(f"{shown(path)} does not exist")
    if size > limit:
        raise ConfigError(f"{shown(path)} must have at most {limit:,} bytes, got {size:,}.")
    return b"".join(read_parts(path, size))


def read_parts(path: str, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, in parts."""
    if is_url(path):
        for start in range(0, size, PART):
            yield read_range(path, start, min(start + PART, size))
        return
    with open(path, "rb") as file:
        while part := file.read(min(PART, size)):
            size -= len(part)
            yield part


def read_range(url: str, start: int, stop: int) -> bytes:
    """The bytes start..stop - 1 of a remote file, in one request."""
    try:
        data = request(url, "cat_file", start=start, end=stop)
    except FileNotFoundError as error:
        raise ConfigError(f"{error}; copy the data again.") from error
    if len(data) != stop - start:
        raise ConfigError(
            f"{shown(url)} must have the bytes {start:,}..{stop - 1:,}, but a request for them got "
            f"{len(data):,} bytes; copy the file again, or use a server with range requests."
        )
    return data


def sha256(path: str) -> str:
    """The SHA-256 of a file, in constant memory."""
    digest = hashlib.sha256()
    for part in read_parts(path, file_size(path) or 0):
        digest.update(part)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class RemoteColumn(Column):
    """A column at a URL: `read` is one request, and `array` reads all of it once."""

    @functools.cached_property
    def array(self) -> Integer[np.ndarray, "N"]:
        """The column, in memory."""
        return self.read(0, self.length)

    def read(self, start: int, stop: int) -> Integer[np.ndarray, "N"]:
        """The elements start..stop - 1, which must exist."""
        if start == stop:
            return np.empty(0, self.dtype)
        item = np.dtype(self.dtype).itemsize
        data = read_range(self.path, self.offset + start * item, self.offset + stop * item)
        return np.frombuffer(data, self.dtype)


def column(path: str, dtype: str, length: int, offset: int = 0) -> Column:
    """A column of a local or remote file."""
    return (RemoteColumn if is_url(path) else Column)(path, dtype, length, offset)
