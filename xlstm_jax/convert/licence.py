"""The licence of weights, which is not that of this library: found, and carried along."""

import re
from pathlib import Path

FILE = "WEIGHTS_LICENCE.txt"
"""Beside weights that were made of others: what `find` said of these, then their licence file."""

UNKNOWN = "none is stated beside the weights; ask whoever published them before you use them"


def find(folder: str | Path) -> str:
    """What a folder of weights says about their licence, in a line; `UNKNOWN` if nothing."""
    folder = Path(folder)
    carried = _lines(folder / FILE)
    if carried:
        return carried[0]
    file = _file(folder)
    first = f"{_lines(file)[0]} ({file.name})" if file else None
    return _from_card(folder / "README.md") or first or UNKNOWN


def carry(source: str | Path, folder: str | Path) -> str:
    """Puts what a source says, and its licence file, beside weights made of it; returns `find`."""
    line, carried = find(source), Path(source) / FILE
    file = carried if carried.is_file() else _file(Path(source))
    whole = file.read_text(errors="replace") if file else ""
    text = whole if file == carried else f"{line}\n\n{whole}"
    (Path(folder) / FILE).write_text(text.rstrip() + "\n")
    return line


def _from_card(card: Path) -> str | None:
    """The fields of a model card's head that speak of the licence."""
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    found = re.findall(r"^license(?:_name|_link)?: *(.+)$", head[1] if head else "", re.MULTILINE)
    values = [value.split(" #")[0].strip().strip("'\"") for value in found]
    return f"{', '.join(values)} ({card.name})" if values else None


def _file(folder: Path) -> Path | None:
    """A licence file that says something."""
    found = (p for p in sorted(folder.glob("*")) if re.match(r"licen[cs]e", p.name, re.IGNORECASE))
    return next((path for path in found if _lines(path)), None)


def _lines(path: Path) -> list[str]:
    """The lines of a file that are not empty; none if there is no such file."""
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
