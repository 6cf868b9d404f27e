"""Where metrics go: a writer is anything with `write(step, metrics)` and `close()`."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


@runtime_checkable
class Writer(Protocol):
    """Takes the records of a run, in order."""

    def write(self, step: int, metrics: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object a line, on disk at once; what is not finite becomes null."""

    def __init__(self, path: Path):
        self._file = path.open("a")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        record = {"step": step} | metrics
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class ConsoleWriter:
    """A progress bar on a terminal, a line per record elsewhere."""

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
        is_evaluation = "valid_loss" in metrics
        text = _describe_evaluation(metrics) if is_evaluation else self._describe(step, metrics)
        if self._bar is None:
            self._print(f"step {step}/{self._total}  {text}")
        elif is_evaluation:
            self._print(f"step {step}  {text}")
        else:
            self._bar.update(self._task, completed=step, description=text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _describe(self, step: int, metrics: dict[str, Any]) -> str:
        self._step_time = metrics.get("step_time", self._step_time)
        loss = metrics["loss"]
        words = [f"loss {'-' if loss is None else format(loss, '.4f')}"]
        if "tokens_per_second" in metrics:
            words.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if metrics.get("mfu") is not None:
            words.append(f"mfu {metrics['mfu']:.1%}")
        if metrics["skipped"]:
            words.append(f"{metrics['skipped']} skipped")
        if self._step_time is not None:
            words.append(f"{_duration(self._step_time * (self._total - step))} left")
        return "  ".join(words)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@dataclasses.dataclass(frozen=True)
class CallbackWriter:
    """Hands every record to a function."""

    write: Callable[[int, dict[str, Any]], None]

    def close(self) -> None:
        pass


def _describe_evaluation(metrics: dict[str, Any]) -> str:
    words = [f"held-out loss {metrics['valid_loss']:.4f}"]
    if "valid_bits_per_byte" in metrics:
        words.append(f"bits per byte {metrics['valid_bits_per_byte']:.3f}")
    words.append(f"accuracy {metrics['valid_accuracy']:.3f}")
    return "  ".join(words)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
