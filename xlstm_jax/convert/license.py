"""The license of weights, which is not that of this library: read, and copied along."""

import re
from pathlib import Path

FILE, OLD_FILE = "WEIGHTS_LICENSE.txt", "WEIGHTS_LICENCE.txt"
"""Beside converted weights: the line of `find` for their source, then its license file."""

UNKNOWN = "none is stated beside the weights; ask whoever published them before you use them"


def find(folder: str | Path) -> str:
    """What a folder of weights says about their license, in a line; `UNKNOWN` if nothing."""
    copied, file = copied_file(folder), _file(Path(folder))
    if copied:
        return _lines(copied)[0]
    first = f"{_lines(file)[0]} ({file.name})" if file else UNKNOWN
    return _from_card(Path(folder) / "README.md") or first


def copied_file(folder: str | Path) -> Path | None:
    """What `copy` has put into a folder, under either name."""
    paths = (Path(folder) / name for name in (FILE, OLD_FILE))
    return next((path for path in paths if _lines(path)), None)


def copy(source: str | Path, folder: str | Path) -> str:
    """Writes what a source says, and its license file, beside weights made of it."""
    line, copied = find(source), copied_file(source)
    file = copied or _file(Path(source))
    text = file.read_text(errors="replace") if file else ""
    text = text if copied else f"{line}\n\n{text}"
    (Path(folder) / FILE).write_text(text.rstrip() + "\n")
    return line


def _from_card(card: Path) -> str | None:
    """The fields of a model card's head that name the license."""
    text = card.read_text(errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    fields = re.findall(r"^license(?:_name|_link)?: *(.+)$", head[1] if head else "", re.MULTILINE)
    values = [value.split(" #")[0].strip().strip("'\"") for value in fields]
    return f"{', '.join(values)} ({card.name})" if values else None


def _file(folder: Path) -> Path | None:
    """A license file that is not empty."""
    found = (p for p in sorted(folder.glob("*")) if re.match(r"licen[cs]e", p.name, re.IGNORECASE))
    return next((path for path in found if _lines(path)), None)


def _lines(path: Path) -> list[str]:
    """The lines of a file that are not empty; none if there is no such file."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]
