"""Progress on standard output."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


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
        if "loss" in metrics:
            text = self._describe(step, metrics)
            if self._bar is not None:
                self._bar.update(self._task, completed=step, description=text)
                return
        else:
            text = _describe_evaluation(metrics)
            if not text:  # statistics, too many to print
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


def _describe_evaluation(metrics: dict[str, Any]) -> str:
    """Validation losses, then whatever single values evaluators returned."""
    parts = []
    if "valid_loss" in metrics:
        parts.append(f"validation loss {metrics['valid_loss']:.4f}")
        if "valid_bits_per_byte" in metrics:
            parts.append(f"bits per byte {metrics['valid_bits_per_byte']:.3f}")
        parts.append(f"accuracy {metrics['valid_accuracy']:.3f}")
        # Of `data.eval_sets`.
        names = [key.removesuffix("_loss") for key in metrics if key.endswith("_loss")]
        names.remove("valid")
        return "  ".join(parts + [f"{name} {metrics[f'{name}_loss']:.4f}" for name in names])
    for name, value in metrics.items():
        if isinstance(value, (int, float)):
            parts.append(f"{name} {value:.4g}")
        elif isinstance(value, str):
            parts.append(f"{name} {value}")
    return "  ".join(parts)
