"""The license of weights, which is not that of this library: read, and copied along."""

import re
from pathlib import Path

FILE, OLD_FILE = "WEIGHTS_LICENSE.txt", "WEIGHTS_LICENCE.txt"
"""Beside converted weights: the line of `find` for their source, then its license file."""

UNKNOWN = "none is stated beside the weights; ask whoever published them before you use them"


def find(folder: str | Path) -> str:
    """What a folder of weights says about their license, in a line; `UNKNOWN` if nothing."""
    folder = Path(folder)
    copied = copied_file(folder)
    if copied:
        return _lines(copied)[0]
    file = _file(folder)
    first = f"{_lines(file)[0]} ({file.name})" if file else None
    return _from_card(folder / "README.md") or first or UNKNOWN


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
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    found = re.findall(r"^license(?:_name|_link)?: *(.+)$", head[1] if head else "", re.MULTILINE)
    values = [value.split(" #")[0].strip().strip("'\"") for value in found]
    return f"{', '.join(values)} ({card.name})" if values else None


def _file(folder: Path) -> Path | None:
    """A license file that is not empty."""
    found = (p for p in sorted(folder.glob("*")) if re.match(r"licen[cs]e", p.name, re.IGNORECASE))
    return next((path for path in found if _lines(path)), None)


def _lines(path: Path) -> list[str]:
    """The lines of a file that are not empty; none if there is no such file."""
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
