"""Writers of metrics: any object with `write(step, metrics)` and `close()`."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


@runtime_checkable
class Writer(Protocol):
    """Receives the records of a run, in order."""

    def write(self, step: int, metrics: dict[str, Any], /) -> None:
        """Writes the record of a logging interval or of an evaluation that ended at `step`."""

    def close(self) -> None:
        """Flushes and releases all resources; called once, also after an error."""


class JsonlWriter:
    """Appends one JSON object per line; non-finite values become null."""

    def __init__(self, path: Path):
        # Unbuffered: after a failed write nothing is left to be written when the file is closed.
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends a record, completely or not at all."""
        # JSON has no NaN or infinity.
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in ({"step": step} | metrics).items()
        }
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


class ConsoleWriter:
    """Shows a progress bar on a terminal, and prints one line per record elsewhere."""

    def __init__(self, total: int, start: int = 0, console: Console | None = None):
        self._console = console or Console()
        self._total = total
        self._step_time: float | None = None
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._bar.add_task("compiling", total=total, completed=start)
            self._bar.start()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Prints a record, or updates the bar; evaluations are always printed."""
        if "valid_loss" in metrics:
            text = f"held-out loss {metrics['valid_loss']:.4f}"
            if "valid_bits_per_byte" in metrics:
                text += f"  bits per byte {metrics['valid_bits_per_byte']:.3f}"
            text += f"  accuracy {metrics['valid_accuracy']:.3f}"
            for name in (key.removesuffix("_loss") for key in metrics if key.endswith("_loss")):
                if name != "valid":  # of `data.eval_sets`
                    text += f"  {name} {metrics[f'{name}_loss']:.4f}"
        else:
            text = self._describe(step, metrics)
            if self._bar is not None:
                self._bar.update(self._task, completed=step, description=text)
                return
        prefix = f"step {step}" if self._bar else f"step {step}/{self._total}"
        self._console.print(f"{prefix}  {text}", markup=False, highlight=False, soft_wrap=True)

    def _describe(self, step: int, metrics: dict[str, Any]) -> str:
        # The first interval of a run may have no step time.
        self._step_time = metrics.get("step_time", self._step_time)
        loss = metrics["loss"]
        # None if all steps of the interval were skipped.
        text = f"loss {'-' if loss is None else format(loss, '.4f')}"
        if "tokens_per_second" in metrics:
            text += f"  {metrics['tokens_per_second']:,.0f} tokens/s"
        if metrics.get("mfu") is not None:
            text += f"  mfu {metrics['mfu']:.1%}"
        if metrics["skipped"]:
            text += f"  {metrics['skipped']} skipped"
        if self._step_time is not None:
            minutes, seconds = divmod(round(self._step_time * (self._total - step)), 60)
            hours, minutes = divmod(minutes, 60)
            text += f"  {f'{hours}:{minutes:02}' if hours else minutes}:{seconds:02} left"
        return text

    def close(self) -> None:
        """Stops the progress bar."""
        if self._bar is not None:
            self._bar.stop()


@dataclasses.dataclass(frozen=True)
class CallbackWriter:
    """Calls a function with every record."""

    write: Callable[[int, dict[str, Any]], None]

    def close(self) -> None:
        """Does nothing."""
