"""Reading of a file as documents, in constant memory, and the split of each."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from xlstm_jax.data.documents import document
from xlstm_jax.data.documents.array_record import read_records
from xlstm_jax.data.documents.columns import read_columns
from xlstm_jax.data.documents.document import Content, Document, Fields, File, Split, pieces
from xlstm_jax.data.documents.files import JSON, RECORDS, suffix
from xlstm_jax.data.documents.json_records import read_json
from xlstm_jax.data.documents.splits import (
    ranges_of_parts,
    split_by_content,
    split_of_digest,
)
from xlstm_jax.data.documents.streams import is_compressed, read_blocks, read_text_blocks
from xlstm_jax.errors import ConfigError, quote_path

HASHED = 1 << 30
"""Bytes of a document that its split depends on: all of a text that fits in memory."""

_READERS: Mapping[str, Callable[[File, Fields], Iterator[tuple[int, Content]]]] = {
    **dict.fromkeys(JSON, read_json),
    ".parquet": read_columns,
    ".arrow": read_columns,
    ".arrayrecord": read_records,
}

# Where the second and third split of a divided document begin, by the number of splits.
_PERCENTS = {2: (95,), 3: (90, 95)}


def read(
    file: File, *, text_field: str = "text", messages_field: str | None = None
) -> Iterator[tuple[Split, Document]]:
    """Yields the documents of a file that `find_files` returned, and the split of each.

    Memory does not depend on the size of the file: text is read in blocks, records in batches. The
    split by content depends on the first GiB of a document.

    Args:
        text_field: the field or column with the text of a record.
        messages_field: the one with the messages of a chat, which is read instead.

    Raises:
        ConfigError: the file is damaged, a record is invalid, or text has no messages.
    """
    fields = Fields(text_field, messages_field)
    if suffix(file.name) in RECORDS:
        return _read_documents(file, fields)
    if messages_field is not None:
        raise ConfigError(
            f"{quote_path(file.path)} must have records with the field {fields.describe()}, but it "
            "is text; select files of records with a pattern."
        )
    return _read_text(file)


def _read_documents(file: File, fields: Fields) -> Iterator[tuple[Split, Document]]:
    for number, content in _READERS[suffix(file.name)](file, fields):
        name = f"{file.name}:{number}"
        if not isinstance(content, bytes):
            yield _split_of(file, content), Document(name, b"", messages=content)
        elif len(content) > document.MAX_PIECE:
            split = _split_of(file, content)
            for data, is_last in pieces([content]):
                yield split, Document(name, data, is_last)
        else:
            yield _split_of(file, content), Document(name, content)


def _split_of(file: File, content: Content) -> Split:
    if file.split is not None:
        return file.split
    if not isinstance(content, bytes):
        # Columns hold values that are not JSON, such as dates.
        content = json.dumps(content, sort_keys=True, default=repr).encode()
    return _among(file, split_by_content(content))


def _among(file: File, split: Split) -> Split:
    """A split of the file; if "valid" is taken from "train", the share of "test" remains train."""
    return split if split in file.splits else "train"


def _read_text(file: File) -> Iterator[tuple[Split, Document]]:
    blocks = read_text_blocks(file.path, any_bytes=file.is_selected)
    if file.is_divided:
        parts = itertools.groupby(_parts_of(blocks, _ranges(file)), key=lambda part: part[0])
        for number, part in parts:
            split = file.splits[number]
            for data, is_last in pieces(block for _, block in part):
                yield split, Document(f"{file.name}:{split}", data, is_last)
        return
    split = file.split
    for data, is_last in pieces(blocks):
        if split is None:
            digest = hashlib.sha256(data).digest() if is_last else _digest(file)
            split = _among(file, split_of_digest(digest))
        yield split, Document(file.name, data, is_last)


def _parts_of(
    blocks: Iterable[bytes], ranges: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, bytes]]:
    """The bytes of blocks within each range, with its number; ranges are in order."""
    position = 0
    for block in blocks:
        for number, (start, stop) in enumerate(ranges):
            part = block[max(start - position, 0) : max(stop - position, 0)]
            if part:
                yield number, part
        position += len(block)


def _digest(file: File) -> bytes:
    """The hash of a text of several pieces, which is read once more, so that copies of it, and the
    same text read into memory, have one split."""
    digest = hashlib.sha256()
    for block in read_blocks(file.path, 0, HASHED):
        digest.update(block)
    return digest.digest()


def _ranges(file: File) -> list[tuple[int, int]]:
    size = None if is_compressed(file.path) else file.size
    return ranges_of_parts(
        lambda start: read_blocks(file.path, start), _PERCENTS[len(file.splits)], size
    )
