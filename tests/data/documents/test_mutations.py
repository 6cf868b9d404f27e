"""Damaged files of every format: one line with the path, or documents; bounded memory and time."""

import gzip
import io
import json
import resource

import pytest

from tests.data.mutations import mutations
from xlstm_jax.config import ConfigError
from xlstm_jax.data.documents import find_files, read

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = [f"document number {number} " * 10 for number in range(100)]
JSON = b"".join(json.dumps({"id": n, "text": t}).encode() + b"\n" for n, t in enumerate(TEXTS))
TABLE = pa.table({"id": list(range(100)), "text": TEXTS})
DICTIONARY = pa.table({"text": pa.array(TEXTS).dictionary_encode()})
CHAT = pa.table({"messages": [[{"role": "user", "content": text}] for text in TEXTS]})


def parquet(table, **options):
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=60, **options)
    return file.getvalue()


def arrow(table, new=pa.ipc.new_stream, **options):
    file = io.BytesIO()
    with new(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=40)
    return file.getvalue()


def records(folder):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(folder / "new"), "group_size:2")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    return (folder / "new").read_bytes()


FILES = {
    "jsonl.jsonl": lambda _: JSON,
    "array.json": lambda _: b"[" + JSON.replace(b"\n", b",")[:-1] + b"]",
    "text.txt.gz": lambda _: gzip.compress("".join(TEXTS).encode()),
    "text.txt.zst": lambda _: zstandard.compress("".join(TEXTS).encode()),
    "compressed.jsonl.gz": lambda _: gzip.compress(JSON),
    "compressed.jsonl.zst": lambda _: zstandard.compress(JSON),
    "default.parquet": lambda _: parquet(TABLE),
    "plain.parquet": lambda _: parquet(TABLE, use_dictionary=False, compression="none"),
    "zstd.parquet": lambda _: parquet(TABLE, compression="zstd", data_page_version="2.0"),
    "dictionary.parquet": lambda _: parquet(DICTIONARY),
    "chat.parquet": lambda _: parquet(CHAT),
    "stream.arrow": lambda _: arrow(TABLE),
    "file.arrow": lambda _: arrow(TABLE, pa.ipc.new_file),
    "zstd.arrow": lambda _: arrow(TABLE, compression="zstd"),
    "dictionary.arrow": lambda _: arrow(DICTIONARY),
    "chat.arrow": lambda _: arrow(CHAT),
    "records.arrayrecord": records,
}


def read_mutations(folder, name, count, seed):
    """Reads damaged files; the number of those that were refused."""
    path, refused = folder / name, 0
    data = FILES[name](folder)
    field = "messages" if name.startswith("chat") else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for changed in mutations(data, count, seed):
        path.write_bytes(changed)
        try:
            for file in find_files(str(path)):
                for _, document in read(file, messages_field=field):
                    assert document.data or document.messages
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error) and name in str(error) and len(str(error)) < 1000
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 200 << 10  # KiB
    return refused


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_an_error_of_one_line_or_its_records_are_read(tmp_path, name):
    assert read_mutations(tmp_path, name, 60, seed=0) >= 15


# Of every format; other layouts of them are exhaustive.
SLOW = ("jsonl.jsonl", "text.txt.gz", "default.parquet", "stream.arrow", "records.arrayrecord")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.exhaustive)
        for name in FILES
    ],
)
def test_a_thousand_damaged_files_are_errors_of_one_line_or_read(tmp_path, name):
    assert read_mutations(tmp_path, name, 1000, seed=1) >= 250


def test_mutations_are_the_same_for_a_seed_and_change_nearly_every_copy():
    first = list(mutations(JSON, 50, seed=3))
    assert first == list(mutations(JSON, 50, seed=3)) != list(mutations(JSON, 50, seed=4))
    assert sum(changed != JSON for changed in first) >= 45
