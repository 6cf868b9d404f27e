"""The files of a checkpoint with their sizes and checksums, to detect corruption before reading.

The array store beneath a checkpoint does not notice a flipped bit, and meets a truncated file with
a page of tracebacks from its threads; this finds both first.
"""

import json
import zlib
from pathlib import Path

NAME = "manifest.json"
OLD_NAME = "seal.json"  # of checkpoints written before it was renamed; same contents


def write(folder: Path) -> None:
    """Lists the files of the sub-folders of `folder`; files beside them may still change."""
    paths = [path for path in sorted(folder.glob("*/**/*")) if path.is_file()]
    files = {str(path.relative_to(folder)): _measure(path) for path in paths}
    (folder / NAME).write_text(json.dumps(files, indent=1))


def verify(folder: Path) -> str | None:
    """What is wrong with `folder`, as half a sentence; None if it is as it was written.

    A folder without a manifest passes.
    """
    path = next((folder / n for n in (NAME, OLD_NAME) if (folder / n).is_file()), None)
    if path is None:
        return None
    try:
        files = json.loads(path.read_text())
    except ValueError:
        return f"{path} must be readable, but it is damaged"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} must exist, but it is gone"
        if path.stat().st_size != expected["size"]:
            return f"{path} must have {expected['size']} bytes, got {path.stat().st_size}"
        if _measure(path) != expected:
            return f"{path} must be as it was written, but its checksum differs"
    return None


def _measure(path: Path) -> dict[str, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"size": size, "crc32": checksum}
