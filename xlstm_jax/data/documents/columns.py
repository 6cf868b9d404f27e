"""Documents of columns: Parquet and Arrow files, of which only the needed column is read."""

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

from xlstm_jax.data.documents.document import Content, Fields, File, check_messages
from xlstm_jax.data.documents.files import suffix
from xlstm_jax.data.documents.streams import decompressed
from xlstm_jax.errors import ConfigError, import_optional, quote, quote_path, shorten

_BATCH_SIZE = 64
"""Records that are decoded at a time. A small file may have one long text many times."""

_MAPPED = 16 << 20
"""Bytes that are read before mapped memory is released."""

_MAGIC = b"ARROW1"


def read_columns(file: File, fields: Fields) -> Iterator[tuple[int, Content]]:
    """Yields the number and content of each record of a .parquet or .arrow file.

    Raises:
        ConfigError: the file is damaged, or lacks the column.
    """
    purpose = f"reading {quote_path(file.path)}"
    pa = import_optional("pyarrow", purpose, install="xlstm-jax[data]")
    try:
        with decompressed(file.path) as path:
            number = 0
            for array in _arrays(path, file, fields):
                contents = _texts(array) if fields.messages is None else array.to_pylist()
                for content in contents:
                    number += 1
                    if content and fields.messages is not None:
                        check_messages(content, file, "record", number)
                    if content:
                        yield number, content
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        problem = shorten(str(error), 200)
        raise ConfigError(
            f"{quote_path(file.path)} is damaged ({problem}); fetch it again."
        ) from error


def _arrays(path: str, file: File, fields: Fields) -> Iterator[Any]:
    """The column in batches."""
    # Mapped memory is bounded by the file, even if its headers claim more.
    with open(path, "rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    read = _parquet if suffix(file.name) == ".parquet" else _arrow
    num_bytes = 0
    for array in read(data, file, fields):
        yield array
        num_bytes += array.nbytes
        if num_bytes > _MAPPED and hasattr(mmap, "MADV_DONTNEED"):
            # The system may drop these pages, but counts them as memory of this process.
            data.madvise(mmap.MADV_DONTNEED)
            num_bytes = 0


def _parquet(data: mmap.mmap, file: File, fields: Fields) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as parquet:
        index = _check_schema(parquet.schema_arrow, file, fields)
        is_dictionary = pa.types.is_dictionary(parquet.schema_arrow.field(index).type)
        # Every batch has a copy of the dictionary, and texts are not repeated yet.
        batch_size = 1 << 16 if is_dictionary else _BATCH_SIZE
        for batch in parquet.iter_batches(batch_size, columns=[fields.name], use_threads=False):
            for array in _parts(batch.column(fields.name)):
                array.validate(full=True)  # UTF-8
                yield array


def _arrow(data: mmap.mmap, file: File, fields: Fields) -> Iterator[Any]:
    """The column of the file or the stream format, in batches.

    The file format is a stream between a magic and an index. Both are read as streams: then no
    offset of the index must be trusted.
    """
    import pyarrow as pa

    source, start = pa.BufferReader(data), 0
    if data[: len(_MAGIC)] == _MAGIC:
        start = 8  # the magic is padded
        if data[-len(_MAGIC) :] != _MAGIC:
            raise ValueError("it ends early")
    source.seek(start)
    index = _check_schema(pa.ipc.open_stream(source).schema, file, fields)
    options = pa.ipc.IpcReadOptions(included_fields=[index], use_threads=False)
    source.seek(start)
    with pa.ipc.open_stream(source, options=options) as reader:
        for batch in reader:
            column = batch.column(0)
            # Else offsets could point outside of the file, and null counts could be wrong.
            column.validate(full=True)
            yield from _parts(column)


def _parts(column: Any) -> Iterator[Any]:
    """A column in batches, without dictionaries."""
    import pyarrow as pa

    for first in range(0, len(column), _BATCH_SIZE):
        part = column.slice(first, _BATCH_SIZE)
        yield part.dictionary_decode() if isinstance(part, pa.DictionaryArray) else part


def _check_schema(schema: Any, file: File, fields: Fields) -> int:
    """The index of the column; raises ConfigError if it is absent or of another type."""
    import pyarrow.types as types

    names = schema.names
    if names.count(fields.name) != 1:
        raise ConfigError(
            f"{quote_path(file.path)} must have one column {fields.describe()}, got {quote(names)}."
        )
    kind = schema.field(fields.name).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if fields.messages is None and any(is_text(value) for is_text in texts):
        return names.index(fields.name)
    is_list = types.is_list(kind) or types.is_large_list(kind)
    if fields.messages is not None and is_list and types.is_struct(kind.value_type):
        return names.index(fields.name)
    needed = "text" if fields.messages is None else "lists of messages"
    raise ConfigError(
        f"{quote_path(file.path)} must have {needed} in the column {fields.describe()}, got "
        f"{quote(str(kind))}."
    )


def _texts(array: Any) -> Iterator[bytes]:
    """The UTF-8 bytes of the texts of a column; empty for null."""
    import pyarrow as pa

    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        array = array.cast(pa.large_string())
    if array.null_count:
        array = array.fill_null("")
    _, offsets, data = array.buffers()
    if not len(array) or data is None:
        return iter([b""] * len(array))
    dtype = np.int32 if pa.types.is_string(array.type) else np.int64
    bounds = np.frombuffer(offsets, dtype)[array.offset : array.offset + len(array) + 1].tolist()
    view = memoryview(data)
    return (bytes(view[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False))
