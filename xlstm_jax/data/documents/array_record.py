"""Documents of ArrayRecord files: records are texts, or JSON objects."""

import json
from collections.abc import Iterator

from xlstm_jax.data.documents.document import Content, Fields, File, content_of, fail
from xlstm_jax.data.documents.streams import decompressed
from xlstm_jax.errors import ConfigError, import_optional, quote_path, shorten

# Records are read in order, without a buffer and a thread for each part of the file.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def read_records(file: File, fields: Fields) -> Iterator[tuple[int, Content]]:
    """Yields the number and content of each record of an .arrayrecord file.

    They are texts, unless the first one is a JSON object: then all of them are objects.

    Raises:
        ConfigError: the file is damaged, or a record is neither, or has no such field.
    """
    is_json = fields.messages is not None
    for number, record in _records(file):
        try:
            text = record.decode()
        except UnicodeDecodeError:
            fail(file, "record", number, "must be UTF-8 text or a JSON object; convert the file")
        if number == 1 and text.lstrip().startswith("{"):
            is_json = is_json or _is_object(text)
        if not is_json:
            if record:
                yield number, record
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            fail(file, "record", number, f"must be a JSON object, as the first one ({error})")
        content = content_of(value, file, fields, "record", number)
        if content:
            yield number, content


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _records(file: File) -> Iterator[tuple[int, bytes]]:
    module, purpose = "array_record.python.array_record_module", f"reading {quote_path(file.path)}"
    ArrayRecordReader = import_optional(module, purpose, install="array_record").ArrayRecordReader
    with decompressed(file.path) as path:
        problem = "it has no valid footer"
        try:
            reader = ArrayRecordReader(path, _OPTIONS)
            for number in range(1, reader.num_records() + 1):
                yield number, reader.read()
            is_valid = reader.ok()
            reader.close()
        except (RuntimeError, ValueError, IndexError) as error:
            is_valid, problem = False, shorten(str(error), 200)
    if not is_valid:
        raise ConfigError(f"{quote_path(file.path)} is damaged ({problem}); fetch it again.")
