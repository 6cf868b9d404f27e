"""The manifest of a checkpoint: sizes and checksums of its files, verified before restoring.

The array store does not detect a flipped bit, and reports a truncated file with a page of
tracebacks from its threads. The manifest detects both first.
"""

import json
import zlib
from pathlib import Path

NAME = "manifest.json"
OLD_NAME = "seal.json"  # of older checkpoints; same contents


def write(folder: Path) -> None:
    """Writes the manifest of all files in subfolders of `folder`.

    Files directly in `folder` are not listed, because they may still change.
    """
    paths = [path for path in sorted(folder.glob("*/**/*")) if path.is_file()]
    files = {str(path.relative_to(folder)): _measure(path) for path in paths}
    (folder / NAME).write_text(json.dumps(files, indent=1))


def verify(folder: Path) -> str | None:
    """Describes the first problem of `folder`, for an error message; None if there is none.

    A folder without a manifest passes.
    """
    path = next((folder / n for n in (NAME, OLD_NAME) if (folder / n).is_file()), None)
    if path is None:
        return None
    try:
        files = json.loads(path.read_text())
    except ValueError:
        return f"{path} must be valid JSON, but it is corrupt"
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


def _measure(path: Path) -> dict[str, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):  # in blocks, as a file may not fit in memory
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"size": size, "crc32": checksum}
