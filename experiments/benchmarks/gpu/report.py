"""Rows of one section, written after each of them, and the turns that sections take on the GPU.

Sections run side by side in processes of their own. Each compiles everything it needs, says so by a
file `ready.NAME`, and waits for the file `go`; from then on it measures under one lock, so that
nothing else runs on the GPU. A section that is stopped leaves the rows it has.
"""

import contextlib
import fcntl
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]


class Report:
    """Rows of the section `name` in `folder`."""

    def __init__(self, name: str, folder: pathlib.Path, *, start: float = 0, alone: bool = False):
        """`alone`: no other section runs, so there is nothing to wait for."""
        self.name, self.folder, self.rows = name, folder, []
        self._start, self._alone = start or time.time(), alone
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, what: str, fn: Callable[[], Row] | None = None, **row: Any) -> None:
        """A row with what `fn` returns, or with the error that it raises."""
        begin = time.time()
        try:
            row |= fn() if fn else {}
        except Exception as error:  # the other rows shall still be measured
            row["error"] = describe(error)
        took, at = time.time() - begin, time.time() - self._start
        self.rows.append({"what": what, **row, "took_s": round(took, 1), "at_s": round(at, 1)})
        self._write()
        print(self.name, json.dumps(self.rows[-1], default=str)[:300], flush=True)

    def fail(self, what: str, error: Exception) -> None:
        """A row for what could not be compiled."""
        self.add(what, error=describe(error))

    def wait(self) -> None:
        """Everything is compiled: wait for the other sections."""
        (self.folder / f"ready.{self.name}").touch()
        while not self._alone and not self.is_timing:
            time.sleep(0.2)

    @property
    def is_timing(self) -> bool:
        """Whether sections have begun to measure."""
        return (self.folder / "go").exists()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """The only section on the GPU."""
        with open(self.folder / "gpu.lock", "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self) -> None:
        text = json.dumps(self.rows, indent=1, default=str)
        (self.folder / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")


def describe(error: Exception) -> str:
    """Type and message, not longer than is readable in a table."""
    return f"{type(error).__name__}: {str(error).strip()[:600]}"
