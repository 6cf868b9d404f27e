"""Files of a folder: their names, suffixes, and the patterns that select them."""

import functools
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from xlstm_jax.errors import ConfigError, quote, quote_path

COMPRESSED = (".gz", ".zst")
TEXT = (".txt", ".md")
JSON = (".jsonl", ".ndjson", ".json")
RECORDS = frozenset((*JSON, ".parquet", ".arrow", ".arrayrecord"))
"""Formats whose records are documents; read as text, a model would learn their syntax."""

FORMATS = ".txt, .md, .jsonl, .ndjson, .json, .parquet, .arrow and .arrayrecord, also .gz or .zst"
_MAX_PATTERNS = 100


def suffix(name: str) -> str:
    """The suffix in lower case, without that of a compression: ".txt" for BOOKS.TXT.gz."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


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
        # The walk follows the order of `folders`, which otherwise depends on the file system.
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
        return suffix(name) in TEXT or suffix(name) in RECORDS
    return any(PurePath(name).match(alternative) for alternative in alternatives(pattern))


@functools.lru_cache(maxsize=16)
def alternatives(pattern: str) -> tuple[str, ...]:
    """The patterns that one with braces stands for: *.txt and *.md for "*.{txt,md}".

    Raises:
        ConfigError: they are too many, or one of them is empty.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)  # text and contents of braces alternate
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    if math.prod(map(len, choices)) > _MAX_PATTERNS:
        raise ConfigError(
            f"data.pattern must stand for at most {_MAX_PATTERNS} patterns, got {quote(pattern)}; "
            "use * instead of braces."
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
