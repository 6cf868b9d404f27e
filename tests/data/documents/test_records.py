"""Formats with one document per record: JSON, Parquet, Arrow and ArrayRecord, and their errors."""

import gzip
import json
import pathlib
import resource
import sys

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, load_all
from xlstm_jax.data.documents import find_files, json_records, read, read_all

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = ["one", "", None, "zwei Wörter", "line\nline", "木\u2028木", "x" * 5000] * 30
EXPECTED = [(number, text.encode()) for number, text in enumerate(TEXTS, 1) if text]
CHATS = [[{"role": "user", "content": f"question {n}"}] for n in range(3)]


def write_json(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_array(path, records):
    path.write_text(json.dumps(records, indent=1))


def write_parquet(path, records, **options):
    pq.write_table(table(records), path, **{"row_group_size": 50} | options)


def write_arrow(path, records, new=pa.ipc.new_stream, change=lambda table: table, **options):
    data = change(table(records))
    with new(str(path), data.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(data, max_chunksize=100)


def write_records(path, records, options="group_size:1"):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), options)
    for record in records:
        is_text = isinstance(record, bytes)
        writer.write(record if is_text else json.dumps(record).encode())
    writer.close()


def table(records):
    return pa.table({name: [record.get(name) for record in records] for name in records[0]})


def cast(kind):
    """Changes the type of the column with the text."""

    def change(data):
        column = data["text"].cast(pa.string())
        is_dictionary = pa.types.is_dictionary(kind)
        column = column.dictionary_encode() if is_dictionary else column.cast(kind)
        return data.set_column(data.schema.names.index("text"), "text", column)

    return change


DICTIONARY = pa.dictionary(pa.int32(), pa.string())
FORMATS = {
    "a.jsonl": write_json,
    "b.ndjson": write_json,
    "c.json": write_json,
    "array.json": write_array,
    "a.parquet": write_parquet,
    "plain.parquet": lambda p, r: write_parquet(p, r, use_dictionary=False, compression="none"),
    "dictionary.parquet": lambda p, r: pq.write_table(cast(DICTIONARY)(table(r)), p),
    "stream.arrow": write_arrow,
    "file.arrow": lambda p, r: write_arrow(p, r, pa.ipc.new_file),
    "large.arrow": lambda p, r: write_arrow(p, r, change=cast(pa.large_string())),
    "view.arrow": lambda p, r: write_arrow(p, r, change=cast(pa.string_view())),
    "dictionary.arrow": lambda p, r: write_arrow(p, r, change=cast(DICTIONARY)),
    "zstd.arrow": lambda p, r: write_arrow(p, r, compression="zstd"),
    "a.arrayrecord": write_records,
    "group.arrayrecord": lambda p, r: write_records(p, r, "group_size:64"),
}


def contents(source, **fields):
    """The number and content of each record of one file."""
    (file,) = find_files(str(source), split="train")
    documents = [doc for _, doc in read(file, **fields)]
    assert all(doc.name.rpartition(":")[0] == source.name for doc in documents)
    return [(int(doc.name.rpartition(":")[2]), doc.messages or doc.data) for doc in documents]


@pytest.mark.parametrize("name", FORMATS)
def test_texts_are_read_with_the_number_of_their_record_and_empty_ones_are_skipped(tmp_path, name):
    FORMATS[name](tmp_path / name, [{"id": n, "text": text} for n, text in enumerate(TEXTS)])
    assert contents(tmp_path / name) == EXPECTED
    in_memory = read_all(str(tmp_path), None).documents["all"]
    assert [doc.data for doc in in_memory] == [text for _, text in EXPECTED]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow", "a.arrayrecord"])
def test_compressed_files_of_every_format_are_read(tmp_path, name):
    path = tmp_path / name
    (write_arrow if name == "a.arrow" else FORMATS.get(name, write_array))(path, [{"text": "one"}])
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert contents(tmp_path / f"{name}.gz") == [(1, b"one")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "stream.arrow", "a.arrayrecord"])
def test_messages_are_read_from_their_field(tmp_path, name):
    FORMATS[name](tmp_path / name, [{"chat": chat} for chat in [*CHATS, None, []]])
    expected = list(enumerate(CHATS, 1))
    assert contents(tmp_path / name, messages_field="chat") == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "stream.arrow", "a.arrayrecord"])
@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        (
            {"body": "x", "id": 1},
            {},
            r"'text' \(data\.text_field, --text-field\), got .*'body', 'i",
        ),
        ({"text": 5}, {}, r"'text' .*, got (5|'int64')"),
        ({"text": "x"}, {"messages_field": "chat"}, r"'chat' \(--messages-field\), got \['text'\]"),
        ({"chat": "x"}, {"messages_field": "chat"}, "(a list|lists) of messages"),
        ({"chat": ["x"]}, {"messages_field": "chat"}, "(a list|lists) of messages"),
    ],
    ids=["no field", "number", "no messages", "text", "list of text"],
)
def test_a_field_that_is_absent_or_of_another_type_is_an_error(
    tmp_path, name, record, fields, message
):
    FORMATS[name](tmp_path / name, [record])
    with pytest.raises(ConfigError, match=rf"{name}.* must have .*{message}"):
        contents(tmp_path / name, **fields)


def test_null_among_messages_is_an_error(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"messages": CHATS[0]}, {"messages": [None]}])
    with pytest.raises(ConfigError, match=r"a\.parquet, record 2, must have a list of messages"):
        contents(tmp_path / "a.parquet", messages_field="messages")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "must be a JSON object .*; correct it"),
        (b"text", "must be a JSON object .*; correct it"),
        (b"[" * 100_000, "must be a JSON object .*recursion"),
        (b'{"text": ' + b"9" * 5000 + b"}", "must be a JSON object .*4300 digits"),
        (b'["text"]', r"must be a JSON object, got \['text'\]"),
        (b'"text"', "must be a JSON object, got 'text'"),
        (b'{"text": "\xff"}', "must be UTF-8; convert the file"),
        (b'{"text": "\\ud800"}', "has half of a surrogate pair"),
        (b'{"text": ["x"]}', r"must have text in 'text' .*, got \['x'\]"),
        (b"{}", "must have the field 'text'"),
    ],
    ids=range(10),
)
def test_an_invalid_line_is_an_error_with_its_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n\n' + line + b'\n{"text": "x"}\n')
    with pytest.raises(ConfigError, match=rf"a\.jsonl, line 3, {message}"):
        contents(path)


@pytest.mark.parametrize(
    "data",
    [
        b'\xef\xbb\xbf{"text": "x"}\r\n \r\n{"text": "y"}',
        b'{"text": "x"}\n\n{"text": "y"}\n\n',
    ],
    ids=["returns and byte order mark", "blank lines"],
)
def test_blank_lines_and_a_byte_order_mark_are_not_records(tmp_path, data):
    (tmp_path / "a.jsonl").write_bytes(data)
    assert contents(tmp_path / "a.jsonl") == [(1, b"x"), (3, b"y")]


def test_files_in_utf16_or_in_an_archive_are_errors_that_say_so(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "x"}\n'.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 1, must be UTF-8; convert the file"):
        contents(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"PK\3\4")
    with pytest.raises(ConfigError, match=r"a\.jsonl must be text, but it is a zip archive"):
        contents(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_line_or_an_array_beyond_the_limit_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_records, "MAX_JSON", 1 << 20)
    line = b'{"text": "' + b"x" * 400_000 + b'"}'
    (tmp_path / "fits.jsonl").write_bytes((line + b"\n") * 4)
    assert len(contents(tmp_path / "fits.jsonl")) == 4
    data = b"[" + b",".join([line] * 4) + b"]" if name == "a.json" else b"\n" + b" " * 9 + line * 4
    (tmp_path / name).write_bytes(data)
    number = 1 if name == "a.json" else 2
    with pytest.raises(ConfigError, match=rf"line {number}, exceeds 1 MiB of JSON; .* \.jsonl"):
        contents(tmp_path / name)


@pytest.mark.parametrize(
    "data", [b'[{"text": "x"}', b'[{"text": "\xff"}]', b'\n[{"a": 1}]', b"[1]"]
)
def test_an_invalid_array_is_an_error(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ConfigError, match=r"a\.json, (line|record) 1, must"):
        contents(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow", "a.arrayrecord"])
@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"x" * 99])
def test_a_damaged_file_is_an_error(tmp_path, name, damage):
    path = tmp_path / name
    FORMATS[name](path, [{"text": text} for text in TEXTS])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"{name} is damaged \(.*\); fetch it again|contains no"):
        contents(path)


def test_an_arrow_file_of_another_kind_is_an_error(tmp_path):
    write_parquet(tmp_path / "a.arrow", [{"text": "x"}])
    write_arrow(tmp_path / "a.parquet", [{"text": "x"}])
    for name in ("a.arrow", "a.parquet"):
        with pytest.raises(ConfigError, match=rf"{name} is damaged"):
            contents(tmp_path / name)


def test_text_that_is_no_utf8_is_an_error(tmp_path):
    column = pa.array([b"fine", b"\xff\xfe"])
    column = pa.Array.from_buffers(pa.string(), 2, column.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet is damaged \(Invalid UTF8"):
        contents(tmp_path / "a.parquet")
    write_records(tmp_path / "a.arrayrecord", [b"fine", b"\xff\xfe"])
    with pytest.raises(ConfigError, match=r"a\.arrayrecord, record 2, must be UTF-8 text"):
        contents(tmp_path / "a.arrayrecord")


def test_records_are_texts_unless_the_first_one_is_an_object(tmp_path):
    path = tmp_path / "a.arrayrecord"
    write_records(path, [b"a text", b"", b'{"text": "x"}'])
    assert contents(path) == [(1, b"a text"), (3, b'{"text": "x"}')]
    write_records(path, [b"{ no object", b"x"])
    assert contents(path) == [(1, b"{ no object"), (2, b"x")]
    write_records(path, [b'{"text": "x"}', b"a text"])
    with pytest.raises(ConfigError, match=r"record 2, must be a JSON object, as the first one"):
        contents(path)


def test_a_small_file_that_repeats_a_long_text_is_read_in_small_batches(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"text": "x" * 100_000}] * 1000, row_group_size=1000)
    assert (tmp_path / "a.parquet").stat().st_size < 50_000
    allocated = pa.total_allocated_bytes()
    peak = 0
    for _ in read(find_files(str(tmp_path / "a.parquet"), split="train")[0]):
        peak = max(peak, pa.total_allocated_bytes() - allocated)
    assert 0 < peak < 30_000_000


def resident_mapped_memory():
    """Bytes of mapped files that count as memory of this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile:"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_pages_of_a_mapped_file_are_released(tmp_path):
    path = tmp_path / "large.arrow"
    write_arrow(path, [{"text": "x" * 60_000 + str(n)} for n in range(1000)])
    before = resident_mapped_memory()
    peak = max(resident_mapped_memory() for _ in read(find_files(str(path), split="train")[0]))
    assert path.stat().st_size > 60_000_000
    assert peak - before < 30_000_000


def test_a_page_that_claims_two_gigabytes_allocates_less(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"text": "x" * 90}] * 9, use_dictionary=False, compression="none")
    data, start = path.read_bytes(), pq.read_metadata(path).row_group(0).column(0).data_page_offset
    assert data[start : start + 3] == b"\x15\0\x15"  # its kind, and then its two sizes
    stop = start + len(b"\x15\0\x15\xd2\x0f\x15\xd2\x0f")
    claim = b"\x15\xfe\xff\xff\xff\x0f"  # Thrift's encoding of 2**31 - 1
    path.write_bytes(data[: start + 2] + claim * 2 + data[stop:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"Page was smaller .* than expected \(2147483647\)"):
        contents(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("a.parquet", "pyarrow"),
        ("stream.arrow", "pyarrow"),
        ("a.arrayrecord", "array_record.python.array_record_module"),
    ],
)
def test_an_absent_package_is_an_error_that_names_it(tmp_path, monkeypatch, name, module):
    FORMATS[name](tmp_path / name, [{"text": "x"}])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=rf"{name} needs the package {module.split('.')[0]}.*`pip"
    ):
        contents(tmp_path / name)


def test_records_are_loaded_into_windows(tmp_path):
    write_json(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    windows = load_all(DataConfig(source=str(tmp_path), seq_len=4))
    assert windows.store.tokens.tolist() == [*b"one", 256, *b"two", 256]


def save_to_disk(folder, records, name="data-00000-of-00001.arrow"):
    """A folder as the package `datasets` writes it."""
    folder.mkdir(parents=True)
    write_arrow(folder / name, records)
    state = {"_data_files": [{"filename": name}], "_split": "train", "_fingerprint": "0"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"description": "x" * 5000}))
    write_arrow(folder / "cache-0123.arrow", [{"text": "of an earlier map"}])


@pytest.mark.parametrize("pattern", [None, "*.arrow", "*"])
def test_a_dataset_that_was_saved_to_disk_is_read_without_its_metadata_and_caches(
    tmp_path, pattern
):
    save_to_disk(tmp_path / "one", [{"text": "words"}])
    assert [d.data for d in read_all(str(tmp_path / "one"), pattern)[1]["all"]] == [b"words"]
    splits = {"train": "training", "validation": "validation", "test": "tests"}
    for split, text in splits.items():
        save_to_disk(tmp_path / "dict" / split, [{"text": text}])
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    documents = {
        split: [doc.data.decode() for doc in map(lambda pair: pair[1], read(file))]
        for file in find_files(str(tmp_path / "dict"), pattern)
        for split in [file.split]
    }
    assert documents == {"train": ["training"], "valid": ["validation"], "test": ["tests"]}


@pytest.mark.parametrize("name", ["train/data-00000-of-00001.arrow", "train/state.json"])
def test_a_saved_dataset_without_a_listed_file_is_an_error(tmp_path, name):
    save_to_disk(tmp_path / "train", [{"text": "words"}])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / name).unlink()
    with pytest.raises(
        ConfigError, match=r"lists '.*', which does not exist; copy the data set ag"
    ):
        find_files(str(tmp_path))


def test_a_state_file_of_another_program_is_data(tmp_path):
    (tmp_path / "state.json").write_text('{"text": "words"}')
    assert contents(tmp_path / "state.json") == [(1, b"words")]
    assert [d.data for d in read_all(str(tmp_path), None)[1]["all"]] == [b"words"]
