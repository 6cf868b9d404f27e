"""Assignment of documents to the splits: by name, by the hash of their content, or by position."""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from xlstm_jax.data.documents.document import Split, character_start
from xlstm_jax.data.documents.files import suffix
from xlstm_jax.errors import ConfigError, quote_path

# The words of Hugging Face's data sets.
WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

# A source file that is called test.py or train.py is named after what its code does.
_SOURCE_CODE = frozenset(
    ".bash .c .cc .cfg .cpp .cs .css .cu .cxx .go .h .hpp .hs .html .ini .ipynb .java .jl .js .jsx "
    ".kt .lua .m .ml .php .pl .proto .py .pyi .pyx .r .rb .rs .scala .sh .sql .swift .toml .ts "
    ".tsx .yaml .yml".split()
)

# A word of a name. Bytes that are not UTF-8, which Python decodes to surrogates, may be letters.
_WORD = re.compile(r"(?:[^\W\d_]|[\udc80-\udcff])+")

_MIN_LINES = 100  # of a document that is divided at line ends
_MAX_GAP = 1 << 16  # bytes
_LINE_FEED, _LINE_END = re.compile(rb"\n"), re.compile(rb"\r\n?|\n")


def splits_of_name(name: str) -> set[Split]:
    """The splits that a path names; folders take precedence over words in the name of the file."""
    *folders, file = name.split("/")
    splits = {WORDS[folder.lower()] for folder in folders if folder.lower() in WORDS}
    if not splits and suffix(file) not in _SOURCE_CODE:
        splits = {WORDS[word] for word in _WORD.findall(file.lower()) if word in WORDS}
    return splits


def splits_by_name(names: Iterable[str]) -> dict[str, Split] | None:
    """The splits of files that name one; None if names do not define the splits.

    They do if one of them is "train", or if every file names a split: a folder test/ within other
    files is not a split.

    Raises:
        ConfigError: names define the splits, and one file names several.
    """
    splits = {name: splits_of_name(name) for name in names}
    if {"train"} not in splits.values() and not all(splits.values()):
        return None
    for name, several in splits.items():
        if len(several) > 1:
            raise ConfigError(
                f"{quote_path(name)} must belong to one split, but its path names "
                f"{' and '.join(sorted(several))}; rename it, or move it into train/, valid/ or "
                "test/."
            )
    return {name: split for name, named in splits.items() for split in named}


def split_by_content(data: bytes) -> Split:
    """Assigns a document to train, valid or test (90/5/5) by the hash of its content.

    A document keeps its split when others are added or it is renamed, and copies of a text always
    share a split.
    """
    return split_of_digest(hashlib.sha256(data).digest())


def split_of_digest(digest: bytes) -> Split:
    """As `split_by_content`, from the SHA-256 digest of the content."""
    # Eight bytes: the bias of the remainder, 100 / 2**64, is negligible.
    share = int.from_bytes(digest[:8], "big") % 100
    return "train" if share < 90 else "valid" if share < 95 else "test"


def divide(data: bytes, percents: Sequence[int]) -> list[bytes]:
    """The parts of one document at the `ranges_of_parts`; a part may be empty."""
    return [
        data[start:stop] for start, stop in ranges_of_parts(lambda start: [data[start:]], percents)
    ]


def ranges_of_parts(
    read: Callable[[int], Iterable[bytes]], percents: Sequence[int], size: int | None = None
) -> list[tuple[int, int]]:
    """Divides one text, in order, near these percentages of its bytes.

    At line ends, so that the parts concatenate to the text, unless it has fewer than 100 lines or a
    long one leaves a part empty. Else by position, without the 1 % before each split: no part
    continues the one before it. No UTF-8 character is broken either way. A text of a few bytes is
    not divided: all parts but the first are empty.

    Args:
        read: the blocks of the text from a position on.
        percents: where the second, third, ... part begins.
        size: bytes of the text, if known; then most of it need not be read.
    """
    size, line_feeds, lines = _measure(read(0), size)
    if not size:
        return [(0, 0)] * (len(percents) + 1)
    positions = [size * percent // 100 for percent in percents]
    if lines >= _MIN_LINES:
        # A text with line feeds may contain stray returns.
        pattern = _LINE_FEED if line_feeds >= _MIN_LINES else _LINE_END
        ends = [start + _line_end(read(start), pattern) for start in positions]
        ranges = list(pairwise([0, *ends, size]))
        if all(start < stop for start, stop in ranges):
            return ranges
    gap = max(1, min(_MAX_GAP, size // 100))
    starts = [0, *(_character(read, start) for start in positions)]
    stops = [*(_character(read, max(0, start - gap)) for start in starts[1:]), size]
    ranges = list(zip(starts, stops, strict=True))
    if all(start < stop for start, stop in ranges):
        return ranges
    return [(0, size)] + [(size, size)] * len(positions)


def _measure(blocks: Iterable[bytes], size: int | None) -> tuple[int, int, int]:
    """Size, line feeds and lines of a text; counts end at `_MIN_LINES` if its size is given."""
    total = line_feeds = line_ends = 0
    last = b""
    for block in blocks:
        line_feeds += block.count(b"\n")
        line_ends += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
        line_ends -= last == b"\r" and block.startswith(b"\n")
        total, last = total + len(block), block[-1:]
        if size is not None and line_feeds >= _MIN_LINES:
            return size, line_feeds, line_ends
    return total, line_feeds, line_ends + (last not in (b"\r", b"\n"))


def _line_end(blocks: Iterable[bytes], pattern: re.Pattern[bytes]) -> int:
    """Bytes up to the end of the first line, or of the text."""
    total, carriage_return = 0, b""
    for block in blocks:
        data = carriage_return + block
        match = pattern.search(data)
        # A line feed may follow a return in the next block.
        if match and (match.end() < len(data) or match[0] != b"\r"):
            return total + match.end()
        carriage_return = b"\r" if match else b""
        total += len(data) - len(carriage_return)
    return total + len(carriage_return)


def _character(read: Callable[[int], Iterable[bytes]], position: int) -> int:
    """The start of the UTF-8 character at a position of a text."""
    first = max(0, position - 3)
    data = b""
    for block in read(first):
        data += block
        if len(data) > 3:
            break
    return first + character_start(data, position - first)
