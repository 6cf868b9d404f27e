"""Damaged copies of a file, for tests of readers: the same ones for a seed."""

import random
import struct
from collections.abc import Callable, Iterator

# Sizes, counts and offsets that readers must not trust.
_CLAIMS = (0, 1, -1, 127, 255, 1 << 15, (1 << 16) - 1, 1 << 24, (1 << 31) - 1, -(1 << 31), 1 << 31)
_LONG_CLAIMS = (*_CLAIMS, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63))


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yields `count` copies of `data`, each with one to three changes of bytes or structure."""
    generator = random.Random(seed)
    for _ in range(count):
        changed = data
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            changed = generator.choice(_CHANGES)(changed, generator)
        yield changed


def _position(data: bytes, generator: random.Random) -> int:
    """A position, half of the time near an end of the file, where headers and footers are."""
    near = min(len(data), 200)
    first = generator.choice((0, 0, 0, len(data) - near))
    return (
        generator.randint(0, len(data))
        if first == 0 and generator.random() < 0.67
        else (generator.randint(first, first + near))
    )


def _flip_bits(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 4, 32))):
        if changed:
            position = min(_position(data, generator), len(data) - 1)
            changed[position] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, generator: random.Random) -> bytes:
    """Replaces an integer of four or eight bytes, of any byte order, by a huge or negative one."""
    code, claims = generator.choice((("<I", _CLAIMS), ("<Q", _LONG_CLAIMS), (">I", _CLAIMS)))
    size = struct.calcsize(code)
    value = generator.choice(claims) % (1 << 8 * size)
    position = _position(data, generator)
    position -= generator.choice((0, position % 4))  # most formats align their integers
    return data[:position] + struct.pack(code, value) + data[position + size :]


def _truncate(data: bytes, generator: random.Random) -> bytes:
    return data[: _position(data, generator)]


def _part(data: bytes, generator: random.Random) -> tuple[int, int]:
    start = _position(data, generator)
    return start, start + generator.choice((1, 4, 8, 64, 1024))


def _repeat(data: bytes, generator: random.Random) -> bytes:
    start, stop = _part(data, generator)
    return data[:start] + data[start:stop] * generator.choice((2, 3, 100)) + data[stop:]


def _delete(data: bytes, generator: random.Random) -> bytes:
    start, stop = _part(data, generator)
    return data[:start] + data[stop:]


def _insert(data: bytes, generator: random.Random) -> bytes:
    start, _ = _part(data, generator)
    inserted = generator.choice((bytes(8), b"\xff" * 8, generator.randbytes(16), b"[" * 5000))
    return data[:start] + inserted + data[start:]


def _swap(data: bytes, generator: random.Random) -> bytes:
    """Exchanges two neighboring parts."""
    start, stop = _part(data, generator)
    end = 2 * stop - start
    return data[:start] + data[stop:end] + data[start:stop] + data[end:]


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip_bits,
    _flip_bits,
    _overwrite,
    _overwrite,
    _truncate,
    _repeat,
    _delete,
    _insert,
    _swap,
)
