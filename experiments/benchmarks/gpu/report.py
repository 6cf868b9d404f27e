"""Records of one section, and the lock under which sections take measurements on the GPU.

Sections run concurrently in separate processes. Each compiles everything it needs, creates the
file `ready.NAME`, and waits for the file `go`; then it measures under a shared lock, so that
nothing else runs on the GPU. Records are written after each measurement, so a section that is
stopped leaves those it has completed.
"""

import contextlib
import fcntl
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

Record = dict[str, Any]


class Report:
    """Records of the section `name`, stored in `folder`."""

    def __init__(self, name: str, folder: pathlib.Path, *, start: float = 0, alone: bool = False):
        """`start`: start time of the run; `alone`: no other section runs, so do not wait."""
        self.name, self.folder, self.records = name, folder, []
        self._start, self._alone = start or time.time(), alone
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, name: str, fn: Callable[[], Record] | None = None, **record: Any) -> None:
        """Adds a record with the result of `fn`, or with the error that it raises."""
        begin = time.time()
        try:
            record |= fn() if fn else {}
        except Exception as error:  # a failure must not prevent the other measurements
            record["error"] = describe(error)
        times = {
            "duration_seconds": round(time.time() - begin, 1),
            "elapsed_seconds": round(time.time() - self._start, 1),  # since the run started
        }
        self.records.append({"name": name, **record, **times})
        self._write()
        print(self.name, json.dumps(self.records[-1], default=str)[:300], flush=True)

    def fail(self, name: str, error: Exception) -> None:
        """Adds a record for a call that did not compile."""
        self.add(name, error=describe(error))

    def wait(self) -> None:
        """Marks this section as compiled and waits until measuring starts."""
        (self.folder / f"ready.{self.name}").touch()
        while not self._alone and not self.is_timing:
            time.sleep(0.2)

    @property
    def is_timing(self) -> bool:
        """Whether measuring has started."""
        return (self.folder / "go").exists()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the lock: no other section uses the GPU meanwhile."""
        with open(self.folder / "gpu.lock", "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released on close, also if the process is killed
            yield

    def _write(self) -> None:
        text = json.dumps(self.records, indent=1, default=str)
        (self.folder / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")


def describe(error: Exception) -> str:
    """Type and message of an error, truncated to fit a table."""
    return f"{type(error).__name__}: {str(error).strip()[:600]}"
