"""Files of a folder, and their bytes: decompressed, and refused if they are no text."""

import functools
import importlib
import itertools
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from xlstm_jax.config import ConfigError
from xlstm_jax.errors import quote, quote_path

MAX_BYTES = 1 << 30
"""Bytes of text in a source, decompressed, because tokens are stored in memory."""

TEXT = (".txt", ".md")
FORMATS = ".txt and .md, each also compressed as .gz or .zst"
# Formats whose rows are documents; read as text, a model would learn their syntax.
ROWS = frozenset(".jsonl .json .ndjson .parquet .arrow .arrayrecord".split())
_MAX_PATTERNS = 100


class _Codec(NamedTuple):
    """A compression format."""

    magic: bytes
    open: Callable[[], tuple[Callable[[], Any], type[Exception]]]
    """Returns the class of a decompressor, with `decompress`, `eof` and `unused_data`, and of its
    errors."""


def _gzip() -> tuple[Callable[[], Any], type[Exception]]:
    return functools.partial(zlib.decompressobj, wbits=16 + zlib.MAX_WBITS), zlib.error


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    try:
        module: Any = importlib.import_module("compression.zstd")  # Python 3.14
        return module.ZstdDecompressor, module.ZstdError
    except ImportError:
        pass
    try:
        module = importlib.import_module("zstandard")
    except ImportError as error:
        raise ConfigError(
            "reading .zst needs Python 3.14 or the package zstandard, which is not installed; "
            "`pip install zstandard`, or decompress the file."
        ) from error
    return lambda: module.ZstdDecompressor().decompressobj(), module.ZstdError


_CODECS = {".gz": _Codec(b"\x1f\x8b\x08", _gzip), ".zst": _Codec(b"\x28\xb5\x2f\xfd", _zstd)}

# Offset and bytes that identify formats which nobody means to train on.
_ARCHIVES = {
    "a zip archive": (0, b"PK\x03\x04"),
    "an xz file": (0, b"\xfd7zXZ\0"),
    "a bzip2 file": (4, b"1AY&SY"),
    "a 7-Zip archive": (0, b"7z\xbc\xaf\x27\x1c"),
    "a tar archive": (257, b"ustar"),
    "a PDF document": (0, b"%PDF-"),
    "a Parquet file": (0, b"PAR1"),
    "an Arrow file": (0, b"ARROW1"),
    "compressed twice": (0, _CODECS[".gz"].magic),
    "compressed twice with zstd": (0, _CODECS[".zst"].magic),
}


def suffix(name: str) -> str:
    """The suffix in lower case, without that of a compression: ".txt" for BOOKS.TXT.gz."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in _CODECS else path.suffix


def walk(
    folder: Path, skip: frozenset[str] = frozenset(), *, follow_links: bool = True
) -> Iterator[str]:
    """Names of the files below a folder, relative to it and in a fixed order.

    Hidden files and folders, and folders named in `skip`, are left out. Links are followed, except
    to a folder that contains them.
    """
    ancestors = {os.fspath(folder): frozenset[tuple[int, int]]()}
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=follow_links):
        chain = ancestors.pop(parent) | {_identity(parent)}
        # Sorting in place fixes the order of the walk, which otherwise depends on the file system.
        folders[:] = sorted(
            name
            for name in folders
            if not (name.startswith(".") or name in skip)
            and _identity(os.path.join(parent, name)) not in chain
        )
        ancestors |= {os.path.join(parent, name): chain for name in folders}
        for name in sorted(files):
            path = os.path.join(parent, name)
            # A pipe would block, but a broken link is an error when it is read.
            is_file = os.path.isfile(path) or not os.path.exists(path)
            if is_file and not name.startswith("."):
                yield Path(path).relative_to(folder).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def matches(name: str, pattern: str | None) -> bool:
    """Whether a file is read: by its pattern, or, for None, by its suffix."""
    if pattern is None:
        return suffix(name) in TEXT
    return any(PurePath(name).match(alternative) for alternative in alternatives(pattern))


@functools.lru_cache(maxsize=16)
def alternatives(pattern: str) -> tuple[str, ...]:
    """The patterns that one with braces stands for: *.txt and *.md for "*.{txt,md}".

    Raises:
        ConfigError: there are too many, or one of them is empty.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)  # text and contents of braces alternate
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    if math.prod(map(len, choices)) > _MAX_PATTERNS:
        raise ConfigError(
            f"data.pattern must stand for at most {_MAX_PATTERNS} patterns, got {quote(pattern)}; "
            "use * in place of braces."
        )
    patterns = tuple(map("".join, itertools.product(*choices)))
    if not all(PurePath(alternative).parts for alternative in patterns):
        raise ConfigError(
            f"data.pattern must match names of files, got {quote(pattern)}; use None for {FORMATS}."
        )
    return patterns


def count_suffixes(names: Sequence[str]) -> str:
    """The number of files and their most frequent suffixes, for messages."""
    counts = Counter(PurePath(name).suffix or "no suffix" for name in names).most_common(5)
    kinds = ", ".join(f"{count} {quote_path(kind)}" for kind, count in counts)
    return f"{len(names)} files ({kinds})" if names else "no files"


def read_text(path: Path, limit: int, *, any_bytes: bool = False) -> bytes:
    """The decompressed content of a file of text.

    Args:
        limit: bytes at which reading stops, so that a small file cannot exhaust the memory.
        any_bytes: accept binary data, because a pattern asks for this file.

    Raises:
        ConfigError: the file is damaged, larger than `limit`, or its content is not text.
    """
    data = path.read_bytes() if path.stat().st_size <= limit else None
    by_name = _CODECS.get(path.suffix.lower())
    if data:
        codec = by_name or next((c for c in _CODECS.values() if data.startswith(c.magic)), None)
        data = _decompress(path, data, codec, limit) if codec else data
    if data is None or len(data) > limit:
        raise ConfigError(
            f"the text of data.source must be at most {MAX_BYTES >> 20:,} MiB, as its tokens are "
            f"stored in memory, but {quote_path(path)} exceeds that; use fewer or smaller files."
        )
    for kind, (offset, magic) in _ARCHIVES.items():
        if data.startswith(magic, offset):
            raise ConfigError(f"{quote_path(path)} must be text, but it is {kind}; unpack it.")
    head = data[: 1 << 16]
    if not any_bytes and head.count(0) * 100 > len(head):  # single ones occur in crawled text
        raise ConfigError(
            f"{quote_path(path)} must be text, but it contains NUL bytes; convert UTF-16 to UTF-8, "
            f"or read binary data as it is with data.pattern={quote('*' + path.suffix)}."
        )
    return data


def _decompress(path: Path, data: bytes, codec: _Codec, limit: int) -> bytes:
    """The content of all frames, or a little more than `limit` bytes of it."""
    new, error_type = codec.open()
    pieces, size, decompressor = [], 0, new()
    # Zstandard can expand a few bytes to 128 KiB, hence small blocks.
    blocks = (data[start : start + 4096] for start in range(0, len(data), 4096))
    try:
        for block in blocks:
            while block and size <= limit:
                if decompressor.eof:
                    # gzip files may be padded with zeros, and may have several members.
                    if codec.magic == _CODECS[".gz"].magic and not block.strip(b"\0"):
                        break
                    decompressor = new()
                pieces.append(decompressor.decompress(block))
                size += len(pieces[-1])
                block = decompressor.unused_data if decompressor.eof else b""
    except error_type as error:
        raise ConfigError(f"{quote_path(path)} is damaged ({error}); fetch it again.") from error
    if not decompressor.eof and size <= limit:
        raise ConfigError(f"{quote_path(path)} is damaged (it ends early); fetch it again.")
    return b"".join(pieces)
