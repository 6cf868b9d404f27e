"""Assignment of documents to the splits: by name, by the hash of their content, or by position."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from xlstm_jax.config import ConfigError
from xlstm_jax.data.config import Split
from xlstm_jax.data.files import suffix
from xlstm_jax.errors import quote_path

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
    files is not a held-out set.

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
    # Eight bytes: the bias of the remainder, 100 / 2**64, is negligible.
    share = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") % 100
    return "train" if share < 90 else "valid" if share < 95 else "test"


def divide(data: bytes, percents: Sequence[int]) -> list[bytes]:
    """Divides one document, in order, near these percentages of its bytes.

    At line ends, so that the parts concatenate to the document, unless it has fewer than 100 lines
    or a long one leaves a part empty. Else by position, without the 1 % before each split: no part
    continues the one before it. No UTF-8 character is broken either way. A document of a few bytes
    is not divided.
    """
    positions = [len(data) * percent // 100 for percent in percents]
    line_feeds = data.count(b"\n")
    line_ends = line_feeds + data.count(b"\r") - data.count(b"\r\n")
    if line_ends + (not data.endswith((b"\r", b"\n"))) >= _MIN_LINES:
        # A text with line feeds may contain stray returns.
        pattern = _LINE_FEED if line_feeds >= _MIN_LINES else _LINE_END
        ends = [
            match.end() if (match := pattern.search(data, start)) else len(data)
            for start in positions
        ]
        parts = [data[start:stop] for start, stop in pairwise([0, *ends, len(data)])]
        if all(parts):
            return parts
    gap = max(1, min(_MAX_GAP, len(data) // 100))
    starts = [0, *(_character(data, start) for start in positions)]
    stops = [*(_character(data, max(0, start - gap)) for start in starts[1:]), len(data)]
    parts = [data[start:stop] for start, stop in zip(starts, stops, strict=True)]
    return parts if all(parts) else [data] + [b""] * len(positions)


def _character(data: bytes, position: int) -> int:
    """The start of the UTF-8 character at a position; the position itself if it is not UTF-8."""
    for start in range(position, max(position - 4, -1), -1):
        if data[start] & 0xC0 != 0x80:
            return start
    return position
