"""Streams of documents: pieces, splits, and memory that does not depend on the size of a file."""

import gzip
import io
import itertools
import json
import os
import tracemalloc

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import SPLITS
from xlstm_jax.data.documents import Document, document, find_files, read, read_path
from xlstm_jax.data.documents.splits import divide, ranges_of_parts, split_by_content


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(document, "MAX_PIECE", 100)


def stream(source, pattern=None, split=None, **fields):
    """The pieces of all documents of a source, by split."""
    documents = {name: [] for name in SPLITS}
    for file in find_files(str(source), pattern, split=split):
        for name, doc in read(file, **fields):
            documents[name].append(doc)
    return documents


def joined(pieces):
    """Documents of pieces."""
    parts = []
    for piece in pieces:
        parts.append(piece.data)
        if piece.is_last:
            yield Document(piece.name, b"".join(parts))
            parts = []
    assert not parts


def write(folder, names, text="{} line\n" * 40):
    for number, name in enumerate(names.split()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.replace("{}", str(number)).encode()
        if ".jsonl" in name:
            lines = [json.dumps({"text": f"{number} {n} " * (n % 30)}) for n in range(80)]
            data = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    return folder


LAYOUTS = {
    "single text": "a.txt",
    "single compressed text": "a.txt.gz",
    "texts": " ".join(f"{number}.txt" for number in range(50)),
    "records": "a.jsonl b.jsonl.gz",
    "records and texts": "a.jsonl b.txt sub/c.md.gz",
    "named": "train/a.txt train/b.jsonl valid/a.txt test.txt c.txt",
    "no valid, few texts": "train/a.txt train/b.txt.gz test/c.txt",
    "no valid, texts": " ".join(f"train/{number}.txt" for number in range(60)),
    "no valid, records": "train/a.jsonl",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stream_has_the_documents_and_splits_of_reading_into_memory(
    tmp_path, short_pieces, layout
):
    write(tmp_path, LAYOUTS[layout])
    expected = read_path(str(tmp_path), None).documents
    documents = stream(tmp_path)
    for split in SPLITS:
        assert [d.data for d in joined(documents[split])] == [d.data for d in expected[split]]
        assert all(0 < len(piece.data) <= 100 for piece in documents[split])
    assert sum(map(len, documents.values())) > 0


def test_all_documents_of_an_explicit_split_belong_to_it(tmp_path):
    write(tmp_path, "train/a.txt test/b.txt c.jsonl")
    documents = stream(tmp_path, split="valid")
    assert not documents["train"] and not documents["test"]
    names = [doc.name for doc in documents["valid"]]
    assert names[:2] == ["c.jsonl:2", "c.jsonl:3"] and names[-2:] == ["test/b.txt", "train/a.txt"]


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("a line\n" * 40, [98, 98, 84]),
        ("a line\r" * 20, [98, 42]),
        ("x" * 100, [100]),
        ("x" * 101, [100, 1]),
        ("\u6728" * 60, [99, 81]),
        ("word\n" + "x" * 250, [5, 100, 100, 50]),
    ],
    ids=["lines", "returns", "fits", "too long", "characters", "long line"],
)
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_pieces_end_at_line_ends_or_at_characters(short_pieces, text, lengths, block):
    data = text.encode()
    blocks = [data[start : start + block] for start in range(0, len(data), block)]
    pieces = list(document.pieces(blocks))
    assert [len(piece) for piece, _ in pieces] == lengths
    assert b"".join(piece for piece, _ in pieces) == data
    assert [is_last for _, is_last in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_the_pieces_of_a_document_share_the_split_of_its_content(tmp_path, short_pieces, name):
    texts = [f"text {number} " * 40 for number in range(40)]
    for number, text in enumerate(texts):
        (tmp_path / str(number)).mkdir()
        data = json.dumps({"text": text}) if "json" in name else text
        data = gzip.compress(data.encode()) if name.endswith("gz") else data.encode()
        (tmp_path / str(number) / name).write_bytes(data)
    documents = stream(tmp_path)
    for split in SPLITS:
        assert all(split_by_content(doc.data) == split for doc in joined(documents[split]))
    assert sum(map(len, documents.values())) >= 3 * len(texts)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=repr)
@pytest.mark.parametrize("lines", [1, 50, 99, 100, 101, 300])
@pytest.mark.parametrize("tail", ["", "tail"])
@pytest.mark.parametrize("percents", [(90, 95), (95,)])
def test_the_division_of_a_text_does_not_depend_on_its_blocks(end, lines, tail, percents):
    data = ("".join(f"line {line} ä{end}" for line in range(lines)) + tail).encode()
    expected = divide(data, percents)
    for size, block in itertools.product((None, len(data)), (1, 2, 64)):

        def blocks(start, block=block):
            return (data[i : i + block] for i in range(start, len(data), block))

        ranges = ranges_of_parts(blocks, percents, size)
        assert [data[start:stop] for start, stop in ranges] == expected


def test_the_lines_of_a_text_of_known_size_are_counted_up_to_100():
    data = b"line\n" * 1000
    seen = []

    def blocks(start):
        for position in range(start, len(data), 50):
            seen.append(position)
            yield data[position : position + 50]

    ranges_of_parts(blocks, (95,), len(data))
    assert len(seen) < 15


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_small_file_that_expands_to_much_text_streams(tmp_path, name):
    text = b'{"text": "' + b"word " * 2000 + b'"}\n' if "json" in name else b"word " * 2000 + b"\n"
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as writer:
        for _ in range(4_000):
            writer.write(text)
    (tmp_path / name).write_bytes(file.getvalue())
    total, seen = 0, find_files(str(tmp_path), split="train")
    tracemalloc.start()
    try:
        for _, doc in read(seen[0]):
            total += len(doc.data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total >= 40_000_000 > 20 * os.path.getsize(tmp_path / name)
    assert peak < 20_000_000


def test_messages_are_not_read_from_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        ConfigError, match="must have records with the field 'messages'.*it is text"
    ):
        stream(tmp_path, messages_field="messages")
