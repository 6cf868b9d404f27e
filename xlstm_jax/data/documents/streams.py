"""Bytes of a file in blocks, decompressed; memory does not depend on the size of the file."""

import contextlib
import functools
import importlib
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any, BinaryIO, NamedTuple

from xlstm_jax.errors import ConfigError, import_optional, quote, quote_path

BLOCK = 1 << 18
"""Bytes that are read at a time. They fit in a cache: larger blocks halve the speed of JSON."""


class _Codec(NamedTuple):
    """A compression format."""

    magic: bytes
    input_size: int
    """Compressed bytes at a time: four may expand to 128 KiB (zstd), and one to 1 KiB (gzip)."""
    open: Callable[[], tuple[Callable[[], Any], type[Exception]]]
    """Returns the class of a decompressor, with `decompress`, `eof` and `unused_data`, and of its
    errors."""


def _gzip() -> tuple[Callable[[], Any], type[Exception]]:
    return functools.partial(zlib.decompressobj, wbits=16 + zlib.MAX_WBITS), zlib.error


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    try:
        module: Any = importlib.import_module("compression.zstd")  # Python 3.14
        return module.ZstdDecompressor, module.ZstdError
    except ImportError:
        pass
    purpose = "reading .zst before Python 3.14"
    module = import_optional("zstandard", purpose, install="xlstm-jax[data]")
    return lambda: module.ZstdDecompressor().decompressobj(), module.ZstdError


_CODECS = {
    ".gz": _Codec(b"\x1f\x8b\x08", 1 << 12, _gzip),
    ".zst": _Codec(b"\x28\xb5\x2f\xfd", 1 << 10, _zstd),
}

# Offset and bytes that identify formats which nobody means to train on.
_ARCHIVES = {
    "a zip archive": (0, b"PK\x03\x04"),
    "an xz file": (0, b"\xfd7zXZ\0"),
    "a bzip2 file": (4, b"1AY&SY"),
    "a 7-Zip archive": (0, b"7z\xbc\xaf\x27\x1c"),
    "a tar archive": (257, b"ustar"),
    "a PDF document": (0, b"%PDF-"),
    "a Parquet file": (0, b"PAR1"),
    "an Arrow file": (0, b"ARROW1"),
    "compressed twice": (0, _CODECS[".gz"].magic),
    "compressed twice with zstd": (0, _CODECS[".zst"].magic),
}

# Control characters without those of text: backspace, tab, line ends, form feed, terminal escape.
_CONTROL = bytes({*range(32), 127} - {*b"\b\t\n\v\f\r\x1b"})


def is_compressed(path: str) -> bool:
    """Whether a file is decompressed: by its suffix or its first bytes."""
    with open(path, "rb") as file:
        return _codec(path, file) is not None


def _codec(path: str, file: BinaryIO) -> _Codec | None:
    head = file.read(4)
    file.seek(0)
    codec = _CODECS.get(PurePath(path).suffix.lower()) if head else None
    return codec or next((c for c in _CODECS.values() if head.startswith(c.magic)), None)


def read_blocks(path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yields the decompressed bytes `start` to `stop` of a file; none of the blocks is empty.

    Raises:
        ConfigError: the compressed data are damaged.
    """
    with open(path, "rb") as file:
        codec, end = _codec(path, file), 0
        if codec is None:
            end = file.seek(start)
        inputs = iter(lambda: file.read(codec.input_size if codec else BLOCK), b"")
        for block in _joined(_decompress(path, inputs, codec)) if codec else inputs:
            begin, end = end, end + len(block)
            if end > start:
                piece = block[max(start - begin, 0) : None if stop is None else stop - begin]
                if piece:
                    yield piece
            if stop is not None and end >= stop:
                return


def _decompress(path: str, blocks: Iterable[bytes], codec: _Codec) -> Iterator[bytes]:
    """The content of all frames."""
    new, error_type = codec.open()
    decompressor = new()
    try:
        for block in blocks:
            while block:
                if decompressor.eof:
                    # gzip files may be padded with zeros, and may have several members.
                    if codec is _CODECS[".gz"] and not block.strip(b"\0"):
                        break
                    decompressor = new()
                yield decompressor.decompress(block)
                block = decompressor.unused_data if decompressor.eof else b""
    except error_type as error:
        raise ConfigError(f"{quote_path(path)} is damaged ({error}); fetch it again.") from error
    if not decompressor.eof:
        raise ConfigError(f"{quote_path(path)} is damaged (it ends early); fetch it again.")


def _joined(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Blocks of at least `BLOCK` bytes, except for the last one."""
    parts, size = [], 0
    for block in blocks:
        parts.append(block)
        size += len(block)
        if size >= BLOCK:
            yield b"".join(parts)
            parts, size = [], 0
    if size:
        yield b"".join(parts)


def read_text_blocks(path: str, *, any_bytes: bool = False) -> Iterator[bytes]:
    """As `read_blocks`, for a file that must be text.

    Args:
        any_bytes: accept binary data, because a pattern asks for this file.

    Raises:
        ConfigError: the file is an archive or holds binary data, or as `read_blocks`.
    """
    blocks = read_blocks(path)
    first = next(blocks, b"")
    head = first[: 1 << 16]
    for kind, (offset, magic) in _ARCHIVES.items():
        if head.startswith(magic, offset):
            raise ConfigError(f"{quote_path(path)} must be text, but it is {kind}; unpack it.")
    if not any_bytes and (unlike_text := _unlike_text(head)):
        raise ConfigError(
            f"{quote_path(path)} must be text, but it contains {unlike_text}; convert UTF-16 to "
            "UTF-8, or read binary data as it is with "
            f"data.pattern={quote('*' + PurePath(path).suffix)}."
        )
    yield first
    yield from blocks


def _unlike_text(head: bytes) -> str | None:
    """What the first bytes of a file have too many of to be text; None if they are text.

    Single ones occur in crawled text. Compressed data, pictures and weights have about 11 % of
    control characters, but as few as 0.4 % of NUL bytes.
    """
    if head.count(0) * 100 > len(head):
        return "NUL bytes"
    if (len(head) - len(head.translate(None, _CONTROL))) * 20 > len(head):
        return "control characters"
    return None


@contextlib.contextmanager
def decompressed(path: str) -> Iterator[str]:
    """The path of a file that is not compressed: of a temporary copy if this one is."""
    if not is_compressed(path):
        yield path
        return
    with tempfile.NamedTemporaryFile() as file:
        for block in read_blocks(path):
            file.write(block)
        file.flush()
        yield file.name
