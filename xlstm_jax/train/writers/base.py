"""What a writer is, and the writers that wrap a function or another writer."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from xlstm_jax.train.processes import describe, extra, log


@runtime_checkable
class Writer(Protocol):
    """Receives the records of a run, in order."""

    def write(self, step: int, metrics: dict[str, Any], /) -> None:
        """Writes the record of a logging interval or of an evaluation that ended at `step`."""

    def close(self) -> None:
        """Flushes and releases all resources; called once, also after an error."""


@dataclasses.dataclass(frozen=True)
class CallbackWriter:
    """Calls a function with every record."""

    write: Callable[[int, dict[str, Any]], None]

    def close(self) -> None:
        """Does nothing."""


class OptionalWriter:
    """Passes records to a writer until it fails: that is logged once and does not end the run."""

    def __init__(self, writer: Writer):
        self._writer: Writer | None = writer

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes a record, unless an earlier one failed."""
        if self._writer is None:
            return
        try:
            self._writer.write(step, metrics)
        except BrokenPipeError:  # the reader of the output is gone, which ends a command
            raise
        except Exception as error:
            log.warning(
                "%s failed at step %d (%s) and is closed; the run continues without it.",
                type(self._writer).__name__, step, describe(error),
            )  # fmt: skip
            self.close()

    def close(self) -> None:
        """Closes the writer, once."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with extra(f"closing {type(writer).__name__}"):
                writer.close()


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names, such as "gates/0m/forget_mean", and values of a record; nulls are left out."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        elif value is not None:
            yield prefix + name, value
