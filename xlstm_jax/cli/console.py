"""Output of commands: colored on a terminal, plain text in a pipe."""

import sys
from collections.abc import Mapping, Sequence

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


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table whose first column is left-aligned and whose others are right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for n, row in enumerate([header, *rows]):
        cells = [
            _encodable(f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}")
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        _line(Text("  ".join(cells), "bold" if n == 0 else ""))


def _line(text: Text) -> None:
    # soft_wrap: rich must not break long lines, which would also break lines in a pipe.
    Console().print(text, soft_wrap=True)
