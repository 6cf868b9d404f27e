"""The manifest of a checkpoint: sizes and checksums of its files, verified before restoring.

The array store does not detect a flipped bit, and reports a truncated file with a page of
tracebacks from its threads. The manifest detects both first.
"""

import json
import zlib
from pathlib import Path
from typing import Any

NAME = "manifest.json"
OLD_NAME = "seal.json"  # of older checkpoints

FORMAT = 2
"""Of checkpoints. 1: written by orbax's V0 interface; its manifest is the table of files alone."""


def write(folder: Path) -> None:
    """Writes the manifest of all files of `folder`, which must not change any more."""
    files = {
        str(path.relative_to(folder)): _measure(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (NAME, OLD_NAME)
    }
    (folder / NAME).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def read_format(folder: Path) -> int:
    """The format of a checkpoint; that of older or damaged manifests is 1."""
    contents = _read(_path(folder))
    version = contents.get("format") if isinstance(contents, dict) else None
    return version if isinstance(version, int) else 1


def verify(folder: Path) -> str | None:
    """Describes the first problem of `folder`, for an error message; None if there is none.

    A folder without a manifest passes.
    """
    path = _path(folder)
    if not path.is_file():
        return None
    files = _read(path)
    if isinstance(files, dict) and "format" in files:
        files = files.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        return f"{path} must list the size and checksum of each file, but it is damaged"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} must exist, but it is missing"
        # The size first: it detects truncation without reading the file.
        if path.stat().st_size != expected["size"]:
            return f"{path} must have {expected['size']} bytes, got {path.stat().st_size}"
        if _measure(path) != expected:
            return f"{path} must be unchanged, but its checksum differs"
    return None


def _path(folder: Path) -> Path:
    old = folder / OLD_NAME
    return old if old.is_file() and not (folder / NAME).is_file() else folder / NAME


def _read(path: Path) -> Any:
    """The JSON value of a file; None if it has none."""
    try:
        return json.loads(path.read_bytes())
    # ValueError includes undecodable bytes; RecursionError is nesting beyond the parser's limit.
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and all(type(value.get(x)) is int for x in ("size", "crc32"))


def _measure(path: Path) -> dict[str, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):  # in blocks, as a file may not fit in memory
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"size": size, "crc32": checksum}
