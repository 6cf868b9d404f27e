"""Formats of files: what is read as text, decompressed, or refused."""

import base64
import bz2
import gzip
import importlib.util
import io
import lzma
import sys
import tarfile
import types
import zipfile
import zlib

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, load, load_all
from xlstm_jax.data.documents import corpus, read_all, streams

TEXT = b"".join(b"line %d of words\n" % number for number in range(500))


def read(path, pattern=None):
    return [document.data for document in read_all(str(path), pattern).documents["all"]]


def tar(data):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", data)
    return file.getvalue()


@pytest.mark.parametrize(
    "name", ["a.txt", "A.TXT", "b.md", "c.Md.gz", "d.txt.GZ"], ids=lambda name: name
)
def test_text_is_recognized_by_its_suffix_in_any_case(tmp_path, name):
    data = gzip.compress(TEXT) if name.lower().endswith(".gz") else TEXT
    (tmp_path / name).write_bytes(data)
    (tmp_path / ".hidden.txt").write_bytes(b"hidden")
    assert read(tmp_path) == [TEXT]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", {"a.txt", "sub/b.txt"}),
        ("*.{txt,TXT}", {"a.txt", "sub/b.txt", "c.TXT"}),
        ("sub/*.{py,txt}", {"sub/b.txt"}),
        ("{a,d}.*", {"a.txt", "d.py"}),
        ("*", {"a.txt", "sub/b.txt", "c.TXT", "d.py"}),
        (None, {"a.txt", "sub/b.txt", "c.TXT"}),
    ],
)
def test_a_pattern_selects_files_at_any_depth(tmp_path, pattern, expected):
    for name in ("a.txt", "sub/b.txt", "c.TXT", "d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert {data.decode() for data in read(tmp_path, pattern)} == expected


@pytest.mark.parametrize("name", ["books.txt.gz", "books.txt", "books"])
@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(TEXT),
        gzip.compress(TEXT[:100]) + gzip.compress(TEXT[100:]),
        gzip.compress(TEXT) + bytes(9000),
    ],
    ids=["one member", "two members", "padded"],
)
def test_gzip_is_decompressed_whatever_the_file_is_called(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path / name) == [TEXT]


@pytest.mark.parametrize(
    "damage",
    [lambda d: d[:-9], lambda d: d[:40] + b"?" + d[41:], lambda d: d + b"tail", lambda d: TEXT],
    ids=["truncated", "changed", "garbage", "not gzip"],
)
def test_damaged_gzip_is_an_error(tmp_path, damage):
    path = tmp_path / "books.txt.gz"
    path.write_bytes(damage(gzip.compress(TEXT)))
    with pytest.raises(ConfigError, match=r"books\.txt\.gz is damaged \(.*\); fetch it again"):
        read(tmp_path)


# One frame with the text "zstandard text\n", written by the program zstd.
FRAME = base64.b64decode("KLUv/QRYeQAAenN0YW5kYXJkIHRleHQKXuJsWw==")


def install_zstandard(monkeypatch):
    """A module instead of the package; its format is zlib's after the magic bytes."""
    magic = streams._CODECS[".zst"].magic

    class Decompressor:
        def decompressobj(self):
            self._inner, self._header = zlib.decompressobj(), len(magic)
            return self

        def decompress(self, data):
            skipped, self._header = self._header, max(0, self._header - len(data))
            return self._inner.decompress(data[skipped:])

        @property
        def eof(self):
            return self._inner.eof

        @property
        def unused_data(self):
            return self._inner.unused_data

    module = types.SimpleNamespace(ZstdDecompressor=Decompressor, ZstdError=zlib.error)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", module)
    return lambda data: magic + zlib.compress(data)


@pytest.mark.parametrize("name", ["a.txt.zst", "a.txt"])
def test_frames_of_zstandard_are_decompressed(tmp_path, monkeypatch, name):
    compress = install_zstandard(monkeypatch)
    (tmp_path / name).write_bytes(compress(TEXT[:100]) + compress(TEXT[100:]))
    assert read(tmp_path) == [TEXT]
    (tmp_path / name).write_bytes(compress(TEXT)[:-5])
    with pytest.raises(ConfigError, match="is damaged"):
        read(tmp_path)


@pytest.mark.skipif(
    sys.version_info < (3, 14) and importlib.util.find_spec("zstandard") is None,
    reason="no reader of Zstandard is installed",
)
def test_a_frame_of_the_program_zstd_is_decompressed(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(FRAME * 2)
    assert read(tmp_path) == [b"zstandard text\n" * 2]
    (tmp_path / "a.txt.zst").write_bytes(FRAME[:-5])
    with pytest.raises(ConfigError, match="is damaged"):
        read(tmp_path)


def test_zstandard_without_a_reader_is_an_error_that_names_the_package(tmp_path, monkeypatch):
    for module in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.txt.zst").write_bytes(FRAME)
    with pytest.raises(ConfigError, match="the package zstandard, which is not installed; `pip"):
        read(tmp_path)


@pytest.mark.parametrize("pattern", [None, "*"])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (zipped(TEXT), "a zip archive"),
        (lzma.compress(TEXT), "an xz file"),
        (bz2.compress(TEXT), "a bzip2 file"),
        (tar(TEXT), "a tar archive"),
        (gzip.compress(tar(TEXT)), "a tar archive"),
        (gzip.compress(gzip.compress(TEXT)), "compressed twice"),
        (b"%PDF-1.7\n", "a PDF document"),
    ],
    ids=["zip", "xz", "bz2", "tar", "tar.gz", "gz.gz", "pdf"],
)
def test_archives_are_refused_whatever_they_are_called(tmp_path, data, kind, pattern):
    (tmp_path / "books.txt").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"books\.txt must be text, but it is {kind}"):
        read(tmp_path, pattern)


def test_binary_data_are_read_only_if_a_pattern_asks_for_them(tmp_path):
    (tmp_path / "books.txt").write_bytes("UTF-16".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"contains NUL bytes; convert .*pattern='\*\.txt'"):
        read(tmp_path)
    assert read(tmp_path, "*.txt") == ["UTF-16".encode("utf-16")]
    (tmp_path / "books.txt").write_bytes(TEXT + b"\0")  # a stray one
    assert read(tmp_path) == [TEXT + b"\0"]


def test_binary_data_are_refused_also_with_few_nul_bytes(tmp_path, rng):
    data = rng.bytes(1 << 16).replace(b"\0", b"\1")  # like weights, pictures or encrypted files
    (tmp_path / "books.txt").write_bytes(data)
    with pytest.raises(ConfigError, match=r"books\.txt must be text, but it contains control char"):
        read(tmp_path)
    assert read(tmp_path, "*.txt") == [data]
    for text in ("größer, 大きい, больше\n".encode(), b"\x1b[1mbold\x1b[0m, b\bb\ttab\f\r\n"):
        (tmp_path / "books.txt").write_bytes(text)
        assert read(tmp_path) == [text]


RECORD = b'{"text": "words"}\n'


@pytest.mark.parametrize("pattern", [None, "*.{jsonl,gz,ndjson}"])
@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "B.NDJSON"])
def test_records_are_documents_also_if_a_pattern_selects_them(tmp_path, name, as_folder, pattern):
    (tmp_path / name).write_bytes(gzip.compress(RECORD) if name.endswith("gz") else RECORD)
    if name != "B.NDJSON" or pattern is None or not as_folder:
        assert read(tmp_path if as_folder else tmp_path / name, pattern) == [b"words"]


def test_every_format_of_a_folder_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a text")
    (tmp_path / "b.jsonl").write_bytes(RECORD)
    assert read(tmp_path) == [b"a text", b"words"]


@pytest.mark.parametrize("name", ["README.md", "license.txt", "notes.md", "readme.md.gz"])
def test_a_readme_beside_larger_records_is_skipped_with_a_warning(tmp_path, caplog, name):
    text = b"describes the records\n"
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    (tmp_path / "a.jsonl").write_bytes(RECORD * 9)
    assert read(tmp_path) == [b"words"] * 9
    assert "1 files (1 ." in caplog.text and "describe the data beside them" in caplog.text
    assert read(tmp_path, "*")[-1] == text or read(tmp_path, "*")[0] == text


def test_json_smaller_than_the_data_beside_it_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / "metadata.json").write_bytes(b"{}")
    assert read(tmp_path) == [TEXT]
    (tmp_path / "metadata.json").write_bytes(b"{}\n" * len(TEXT))
    with pytest.raises(ConfigError, match=r"metadata\.json, line 1, must have the field 'text'"):
        read(tmp_path)


def test_a_single_file_needs_no_suffix(tmp_path):
    for name in ("text8", "main.py"):
        (tmp_path / name).write_bytes(TEXT)
        assert read(tmp_path / name) == [TEXT]
        assert read(tmp_path / name, "*.txt") == [TEXT]  # the pattern is for folders


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "two", "bomb.txt.gz"])
def test_more_text_than_fits_is_refused_before_it_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpus, "MAX_BYTES", 1 << 20)
    data = b"word " * 100_000
    folder = tmp_path / "two" if name == "two" else tmp_path
    folder.mkdir(exist_ok=True)
    if name == "two":
        for copy in range(3):
            (folder / f"{copy}.txt").write_bytes(data)
    elif name == "bomb.txt.gz":
        (folder / name).write_bytes(gzip.compress(b"word " * (1 << 24)))
    else:
        (folder / name).write_bytes(gzip.compress(data * 3) if name.endswith("gz") else data * 3)
    with pytest.raises(ConfigError, match=r"must be at most 1 MiB, as its tokens .* use fewer or"):
        load(DataConfig(source=str(folder)), "train")
    monkeypatch.setattr(corpus, "MAX_BYTES", 1 << 27)
    if name != "bomb.txt.gz":
        assert len(load_all(DataConfig(source=str(folder))).store.tokens) >= 1_500_000


@pytest.mark.parametrize("stop", [1, 1000, streams.BLOCK + 1])
def test_decompression_stops_at_the_end_of_the_range(tmp_path, stop):
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(range(256)) * (1 << 16))[:-8])
    blocks = list(streams.read_blocks(str(tmp_path / "a.gz"), 1, stop + 1))  # its end is damaged
    data = b"".join(blocks)
    assert data == (bytes(range(256)) * (1 + stop // 256))[1 : stop + 1]
