"""The progress of `data prepare`: a bar on a terminal, else lines at intervals."""

import contextlib
import sys
import time
from datetime import timedelta

from rich import progress as rich_progress
from rich.console import Console

from xlstm_jax.data.prepare.progress import Counts, Progress

LINE_SECONDS = 20.0
"""Between lines in a pipe."""


class ProgressDisplay(contextlib.AbstractContextManager):
    """Shows what `update` is called with; on stderr, as results go to stdout."""

    def __init__(self):
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            columns = rich_progress.BarColumn(), rich_progress.TextColumn("{task.description}")
            self._bar = rich_progress.Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=None)
        self._start = time.monotonic()
        self._next_line = self._start + LINE_SECONDS
        self._first: Progress | None = None
        self.last = Progress(0, 0, 0, 0, Counts(0, 0, 0))

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: Progress) -> None:
        """Shows the progress, if it is time."""
        self._first, self.last = self._first or progress, progress
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=progress.size,
                total=max(progress.total_size, 1),
                description=self._text(now),
            )
        elif now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            print(self._text(now), file=sys.stderr, flush=True)

    def shards(self) -> str:
        """The finished shards, in words."""
        return f"{self.last.shards:,} of {self.last.num_shards:,} shards"

    def _text(self, now: float) -> str:
        assert self._first is not None, "after the first update"
        _, _, size, total, counts = self.last
        seconds = max(now - self._start, 1e-9)
        parts = [
            self.shards(),
            f"{size / 1e6:,.0f} of {total / 1e6:,.0f} MB",
            f"{counts.num_bytes / 1e6 / seconds:.1f} MB/s",
            f"{counts.documents:,} documents",
            f"{counts.tokens:,} tokens",
        ]
        if (read := size - self._first.size) > 0:
            left = timedelta(seconds=round((total - size) / read * seconds))
            parts.append(f"{left} left")
        return ", ".join(parts)
