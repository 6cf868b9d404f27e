"""Output of commands: colored on a terminal, plain text in a pipe."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text


def write(text: str) -> None:
    """Writes text unchanged and flushes; characters that stdout cannot encode become "?"."""
    sys.stdout.write(_encodable(text))
    sys.stdout.flush()


def _encodable(text: str) -> str:
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def print_fields(fields: Mapping[str, str]) -> None:
    """Prints one name and value per line."""
    width = max(map(len, fields))
    for name, value in fields.items():
        _line(Text(f"{name:<{width}}  ", "cyan") + Text(_encodable(value)))


def print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints a table whose first column is left-aligned and whose others are right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for n, line in enumerate([header, *lines]):
        cells = [
            _encodable(f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}")
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        _line(Text("  ".join(cells), "bold" if n == 0 else ""))


def _line(text: Text) -> None:
    # soft_wrap: rich must not break long lines, which would also break lines in a pipe.
    Console().print(text, soft_wrap=True)


def print_json(value: Any) -> None:
    """Prints one JSON object: dataclasses and named tuples by field, NaN and infinity as null."""
    write(json.dumps(_to_json(value), indent=1, allow_nan=False) + "\n")


def _to_json(value: Any) -> Any:
    names: Any = getattr(value, "_fields", None)  # of a named tuple
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    if names is not None:
        return {name: _to_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(name): _to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    is_json = isinstance(value, (str, int, bool)) or value is None
    return value if is_json else str(value)  # such as paths


@contextlib.contextmanager
def output_to_stderr() -> Iterator[None]:
    """Redirects stdout to stderr, so that stdout has only the results, which are printed later."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
