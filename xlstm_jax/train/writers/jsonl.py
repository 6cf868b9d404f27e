"""RUN/metrics.jsonl: the records of a run, which everything else reads."""

import json
import math
import os
from pathlib import Path
from typing import Any


class JsonlWriter:
    """Appends one JSON object per line; non-finite values become null."""

    def __init__(self, path: Path):
        # Unbuffered: after a failed write nothing is left to be written when the file is closed.
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends a record, completely or not at all."""
        # JSON has no NaN or infinity.
        record = _finite({"step": step} | metrics)
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:  # such as a full disk, after a part of the line
            self._file.truncate(end)
            error.filename = self._file.name  # absent from errors of writing
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    """A JSON value with null for NaN and infinity, at any depth."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
