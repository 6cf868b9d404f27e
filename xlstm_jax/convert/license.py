"""The license of converted weights, which is not that of this library."""

import re
from pathlib import Path

from xlstm_jax.errors import printable

MAX_TEXT = 10**6  # characters of a license or a model card that are read
MAX_LINE = 200  # characters of the line that `find` returns

FILE, OLD_FILE = "WEIGHTS_LICENSE.txt", "WEIGHTS_LICENCE.txt"
"""File next to converted weights: the line that `find` returns for their source, then its license
text. `OLD_FILE` is the name in earlier versions, still read."""

CARD = "README.md"

UNKNOWN = "none is stated with the weights; ask the publisher before you use them"


def find(folder: str | Path) -> str:
    """One line on the license of the weights in a folder, or `UNKNOWN`."""
    copied, file = copied_file(folder), _file(Path(folder))
    if copied:
        return _lines(copied)[0]
    first = f"{_lines(file)[0]} ({file.name})" if file else UNKNOWN
    # A model card takes precedence over a license file.
    return _from_card(Path(folder) / CARD) or first


def copied_file(folder: str | Path) -> Path | None:
    """The file that `copy` wrote into a folder, under its current or old name; None if missing."""
    paths = (Path(folder) / name for name in (FILE, OLD_FILE))
    return next((path for path in paths if _lines(path)), None)


def copy(source: str | Path, folder: str | Path) -> str:
    """Copies the license of weights next to the converted ones; returns the line of `find`."""
    line, copied = find(source), copied_file(source)
    file = copied or _file(Path(source))
    text = _text(file) if file else ""
    # A copied file starts with the line already.
    text = text if copied else f"{line}\n\n{text}"
    (Path(folder) / FILE).write_text(text.rstrip() + "\n")
    return line


def header_fields(line: str) -> dict[str, str]:
    """The license fields of the YAML header of a model card, for a line that `find` returned.

    The hub knows licenses by identifiers; others have the identifier "other", a name and a link.
    """
    match = re.fullmatch(r"(.*) \(([^()]*)\)", line)
    if match is None:  # `UNKNOWN`, or a sentence
        return {}
    identifier, *others = match[1].split(", ") if match[2] == CARD else ["other"]
    if not re.fullmatch(r"[a-z0-9.-]+", identifier):
        identifier, others = "other", []
    if identifier != "other":
        return {"license": identifier}
    named = re.sub(r"[^a-z0-9.-]+", "-", others[0].lower()) if others else "see-link"
    is_url = len(others) > 1 and re.fullmatch(r"https?://\S+", others[1])
    link = others[1] if is_url else FILE  # a file of the source is not pushed
    return {"license": identifier, "license_name": named, "license_link": link}


def _from_card(card: Path) -> str | None:
    """The license fields in the YAML header of a model card."""
    text = _text(card)
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    fields = re.findall(
        r"^license(?:_name|_link)?: *(.+)$", header[1] if header else "", re.MULTILINE
    )
    values = [value.split(" #")[0].strip().strip("'\"") for value in fields]
    return f"{printable(', '.join(values))[:MAX_LINE]} ({card.name})" if values else None


def _file(folder: Path) -> Path | None:
    """The first license file of a folder that is not empty."""
    is_license = re.compile(r"licen[cs]e", re.IGNORECASE).match
    paths = (path for path in sorted(folder.glob("*")) if is_license(path.name))
    return next((path for path in paths if _lines(path)), None)


def _lines(path: Path) -> list[str]:
    """The non-empty lines of a file, shortened; an empty list if it does not exist."""
    lines = _text(path).splitlines()
    return [printable(line.strip())[:MAX_LINE] for line in lines if line.strip()]


def _text(path: Path) -> str:
    """The first bytes of a file, enough for a message or a copy; empty if it does not exist."""
    if not path.is_file():
        return ""
    with path.open(errors="replace") as file:
        return file.read(MAX_TEXT)
