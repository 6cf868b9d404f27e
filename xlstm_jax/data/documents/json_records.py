"""Documents of JSON: one object a line, or a small file with one array of objects."""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from xlstm_jax.data.documents.document import Content, Fields, File, content_of, fail
from xlstm_jax.data.documents.files import suffix
from xlstm_jax.data.documents.streams import read_text_blocks

MAX_JSON = 64 << 20
"""Bytes of a line, or of a file with one array; its objects can take 20 times this memory."""

_TOO_LONG = "exceeds {} MiB of JSON; write one object a line to a .jsonl file, of shorter texts"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json(file: File, fields: Fields) -> Iterator[tuple[int, Content]]:
    """Yields the number and content of each record of a .jsonl, .ndjson or .json file.

    Raises:
        ConfigError: a record is too long, no JSON object, or has no such field; with its line.
    """
    blocks = read_text_blocks(file.path, any_bytes=True)
    first = next(blocks, b"").removeprefix(_BYTE_ORDER_MARK)
    blocks = itertools.chain([first], blocks)
    is_array = suffix(file.name) == ".json" and first.lstrip().startswith(b"[")
    unit = "record" if is_array else "line"
    for number, record in _array(file, blocks) if is_array else _objects(file, blocks):
        content = content_of(record, file, fields, unit, number)
        if content:
            yield number, content


def _objects(file: File, blocks: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    number = 0
    for lines in _lines(file, blocks):
        for line in lines:
            number += 1
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.strip():
                    continue
                fail(file, "line", number, f"must be a JSON object ({error}); correct it")
            yield number, record


def _lines(file: File, blocks: Iterable[bytes]) -> Iterator[list[str]]:
    """Yields all lines, many at a time, as decoding each of them is slower."""
    number, parts, size = 1, [], 0
    for block in blocks:
        size += len(block)
        if size > MAX_JSON:
            fail(file, "line", number, _TOO_LONG.format(MAX_JSON >> 20))
        # Only line feeds end a line: texts may contain other line separators.
        stop = block.rfind(b"\n") + 1
        if stop:
            lines = _decode(file, number, b"".join((*parts, block[:stop]))).split("\n")[:-1]
            yield lines
            number, parts, block = number + len(lines), [], block[stop:]
            size = len(block)
        parts.append(block)
    yield [_decode(file, number, b"".join(parts))]


def _decode(file: File, number: int, data: bytes) -> str:
    """The text of lines, of which the first one has a number."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number += data.count(b"\n", 0, error.start)
        fail(file, "line", number, "must be UTF-8; convert the file")


def _array(file: File, blocks: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    parts, size = [], 0
    for block in blocks:
        parts.append(block)
        size += len(block)
        if size > MAX_JSON:
            fail(file, "line", 1, _TOO_LONG.format(MAX_JSON >> 20))
    text = _decode(file, 1, b"".join(parts))
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        number = getattr(error, "lineno", 1)
        fail(file, "line", number, f"must be JSON ({error}); correct it")
    yield from enumerate(records, 1)
