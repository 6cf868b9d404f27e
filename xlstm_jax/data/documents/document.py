"""Documents and the files that hold them."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, NoReturn, get_args

from xlstm_jax.errors import ConfigError, quote, quote_path

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

MAX_PIECE = 1 << 19
"""Bytes of text at a time; a longer document comes in pieces.

Tokenizers need about 125 bytes of memory for each byte of a long text.
"""


class Document(NamedTuple):
    """One text, or a piece of it, with a name that does not depend on the location of its folder.

    A text longer than `MAX_PIECE` may come as consecutive pieces, divided at line ends, or at UTF-8
    characters where a line is longer than that.
    """

    name: str  # "part/a.jsonl:17": the path relative to the source, and the record, from 1
    data: bytes  # the text, UTF-8 as it is in the file; empty only with `messages`
    is_last: bool = True  # False for all pieces but the last
    messages: list[dict[str, Any]] | None = None


class File(NamedTuple):
    """A file with documents, and the rule that assigns them to splits."""

    name: str  # relative to the source
    path: str
    size: int  # bytes on disk
    split: Split | None  # of all documents; None: see `splits`
    splits: tuple[Split, ...] = SPLITS
    """Splits of the documents: ("train", "valid") takes 5 % of train as valid."""

    is_divided: bool = False
    """Whether the text is divided by position, and not assigned by its content."""

    is_selected: bool = False
    """Whether a pattern asks for this file, so that text may be any bytes."""


class Fields(NamedTuple):
    """The fields of a record; `messages`, unless it is None, is read instead of `text`."""

    text: str
    messages: str | None

    @property
    def name(self) -> str:
        """The field that is read."""
        return self.text if self.messages is None else self.messages

    def describe(self) -> str:
        """The field, and how a user selects another one."""
        option = "data.text_field, --text-field" if self.messages is None else "--messages-field"
        return f"{quote(self.name)} ({option})"


Content = bytes | list[dict[str, Any]]
"""A text, or the messages of a chat."""


def pieces(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yields the pieces of a text, of at most `MAX_PIECE` bytes, and whether each is the last."""
    parts, size = [], 0
    for block in blocks:
        parts.append(block)
        size += len(block)
        if size > MAX_PIECE:
            data = b"".join(parts)
            while len(data) > MAX_PIECE:
                stop = _end_of_piece(data)
                yield data[:stop], False
                data = data[stop:]
            parts, size = [data], len(data)
    if size:
        yield b"".join(parts), True


def _end_of_piece(data: bytes) -> int:
    for line_end in (b"\n", b"\r"):
        if stop := data.rfind(line_end, 0, MAX_PIECE) + 1:
            return stop
    return character_start(data, MAX_PIECE)


def character_start(data: bytes, position: int) -> int:
    """The start of the UTF-8 character at a position; the position itself if it is not UTF-8."""
    for start in range(position, max(position - 4, -1), -1):
        if data[start] & 0xC0 != 0x80:
            return start
    return position


def content_of(record: Any, file: File, fields: Fields, unit: str, number: int) -> Content | None:
    """The content of a JSON record; None or empty if it has none.

    Raises:
        ConfigError: the record is not an object, or the field is absent or of another type.
    """
    if not isinstance(record, dict):
        fail(file, unit, number, f"must be a JSON object, got {quote(record)}; correct it")
    if fields.name not in record:
        problem = f"must have the field {fields.describe()}, got {quote(list(record))}"
        fail(file, unit, number, problem)
    value = record[fields.name]
    if value is None:
        return None
    if fields.messages is not None:
        return check_messages(value, file, unit, number)
    if not isinstance(value, str):
        fail(file, unit, number, f"must have text in {fields.describe()}, got {quote(value)}")
    try:
        return value.encode()
    except UnicodeEncodeError:  # JSON can escape what UTF-8 cannot encode
        fail(
            file, unit, number, "has half of a surrogate pair, which is not a character; repair it"
        )


def check_messages(value: Any, file: File, unit: str, number: int) -> list[dict[str, Any]]:
    """The messages of a record; raises ConfigError if they are not a list of objects."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        fail(file, unit, number, f"must have a list of messages, got {quote(value)}; correct it")
    return value


def fail(file: File, unit: str, number: int, problem: str) -> NoReturn:
    """Raises a ConfigError about a line or record of a file."""
    raise ConfigError(f"{quote_path(file.path)}, {unit} {number:,}, {problem}.")
