"""How commands speak: in colour on a terminal, in plain text where the output is piped."""

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text


def say(text: str) -> None:
    """Writes text as it is and at once; what the output cannot encode is replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def facts(rows: Mapping[str, str]) -> None:
    """Names and values, a line each."""
    width = max(map(len, rows))
    for name, value in rows.items():
        _line(Text(f"{name:<{width}}  ", "cyan") + Text(value))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns under their heads; the first one is text, the others stand flush right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for n, row in enumerate([heads, *rows]):
        cells = [
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        _line(Text("  ".join(cells), "bold" if n == 0 else ""))


def _line(text: Text) -> None:
    # Soft: a line longer than the screen is left to the terminal, and a pipe has no width.
    Console().print(text, soft_wrap=True)
