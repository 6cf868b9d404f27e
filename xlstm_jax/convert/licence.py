"""The licence of weights, which is not that of this library: found, and carried along."""

import re
from pathlib import Path

FILE = "WEIGHTS_LICENCE.txt"
"""In a run: what `find` found where its weights came from."""

UNKNOWN = "none is stated beside the weights; ask whoever published them before you use them"


def find(folder: str | Path) -> str:
    """What a folder of weights says about their licence, in a line; `UNKNOWN` if nothing."""
    folder = Path(folder)
    carried = folder / FILE
    if carried.is_file():
        return carried.read_text(errors="replace").strip() or UNKNOWN
    return _from_card(folder / "README.md") or _from_file(folder) or UNKNOWN


def write(folder: str | Path, licence: str) -> None:
    """Puts the line beside weights that are written anew."""
    (Path(folder) / FILE).write_text(licence + "\n")


def _from_card(card: Path) -> str | None:
    """The fields of a model card's head that speak of the licence."""
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    fields = re.findall(r"^license(?:_name|_link)?: *(.+)$", head[1] if head else "", re.MULTILINE)
    return f"{', '.join(fields)} ({card.name})" if fields else None


def _from_file(folder: Path) -> str | None:
    """The first line of a licence file."""
    for file in sorted(folder.glob("LICEN[CS]E*")):
        lines = [line.strip() for line in file.read_text(errors="replace").splitlines()]
        first = next(filter(None, lines), None)
        if first:
            return f"{first} ({file.name})"
    return None
