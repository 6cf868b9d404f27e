"""Seeded mutations of bytes, JSON values and command lines."""

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

LONG = "x" * 100_000
DEEP = "[" * 50_000

# Replacements that Python values and JSON share.
VALUES: tuple[Any, ...] = (
    [], {}, None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**20, 10**401, -(10**401),
    0.0, -0.0, 0.5, -1.5, 1e-320, 1e300, float("nan"), float("inf"), float("-inf"),
    "", "0", "a", "msM", "None", "1e400", "\0", "\x1b[31mred\x1b[0m", "a\nb", "\u2028", "\ud800",
    "../..", "/etc/passwd", "~", "%s{0}$x$", LONG, [0] * 1000, ["a", None, [1.5]], [[[[[[]]]]]],
    {"a": 1}, {"": {"": {}}}, {"a\nb": "\x1b"},
)  # fmt: skip

# Texts of values that `json.dumps` cannot write.
TEXTS = ("1e400", "-1e400", "1" * 5000, "NaN", "Infinity", DEEP, DEEP + "]" * 50_000, '"\\ud800"')


def flip(data: bytes, rng: random.Random) -> bytes:
    """Flips some bits."""
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    """Drops the end."""
    return data[: rng.randrange(len(data) + 1)]


def duplicate(data: bytes, rng: random.Random) -> bytes:
    """Repeats a part."""
    start, stop = sorted(rng.choices(range(len(data) + 1), k=2))
    return data[:stop] + data[start:stop] * rng.choice((1, 2, 20)) + data[stop:]


def insert(data: bytes, rng: random.Random) -> bytes:
    """Inserts bytes that are seldom text."""
    position = rng.randrange(len(data) + 1)
    parts = (
        b"\0",
        b"\0" * 512,
        b"\xff\xfe",
        b"\x1b[2J",
        b"\xed\xa0\x80",
        b"\n\n",
        b"}",
        b"\xef\xbb\xbf",
    )
    return data[:position] + rng.choice(parts) + data[position:]


def replace(data: bytes, rng: random.Random) -> bytes:
    """Replaces everything."""
    parts = (b"", b"\0" * 1000, b"null", b"[]", b"5", b'"x"', b"{}", b"\x1f\x8b\x08", DEEP.encode())
    return rng.choice((*parts, b'{"a":' * 50_000, rng.randbytes(64), data * 50))


BYTES = (flip, flip, truncate, duplicate, insert, replace)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One mutation, seldom several."""
    for _ in range(rng.choice((1, 1, 1, 3))):
        data = rng.choice(BYTES)(data, rng)
    return data


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path] + [inner for key, item in items for inner in _paths(item, (*path, key))]


def mutate_value(
    value: Any, rng: random.Random, replacement: Callable[[], Any] | None = None
) -> Any:
    """A copy with one value replaced, removed, renamed, repeated or swapped, seldom several."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        path = rng.choice(_paths(value))
        new = replacement() if replacement else copy.deepcopy(rng.choice(VALUES))
        if not path:
            # Rarely: a file with other contents altogether.
            value = new if rng.random() < 0.3 else value
            continue
        *parents, key = path
        parent = value
        for step in parents:
            parent = parent[step]
        kind = rng.choice(("replace", "replace", "replace", "remove", "rename", "swap", "scale"))
        if kind == "remove":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[rng.choice((str(key) + "_", str(key)[:-1], "\x1b", "a" * 300, "é"))] = (
                parent.pop(key)
            )
        elif kind == "swap":
            other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[other] = parent[other], parent[key]
        elif kind == "scale" and type(parent[key]) in (int, float):
            parent[key] *= rng.choice((-1, 0, 2, 1000, 10**9))
        else:
            parent[key] = new
    return value


def mutate_json(value: Any, rng: random.Random) -> bytes:
    """The text of a mutated JSON value."""
    if rng.random() < 0.3:
        return mutate_bytes(json.dumps(value).encode(), rng)
    if rng.random() < 0.3:
        text = json.dumps(mutate_value(value, rng, lambda: "<mark>"))
        return text.replace('"<mark>"', rng.choice(TEXTS)).encode()
    return json.dumps(mutate_value(value, rng), ensure_ascii=rng.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )


def mutate_lines(data: bytes, rng: random.Random, lines: Sequence[bytes]) -> bytes:
    """Text with lines replaced, moved or added, or with mutated bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    parts = data.splitlines()
    for _ in range(rng.choice((1, 1, 3))):
        position = rng.randrange(len(parts) + 1)
        parts[position : position + rng.choice((0, 1, 1))] = [
            rng.choice((*lines, rng.choice(parts or [b""])))
        ]
    return b"\n".join(parts) + b"\n"


def mutate_arguments(
    arguments: Sequence[str], options: Sequence[str], rng: random.Random
) -> list[str]:
    """A command line with values replaced, and options added, removed, repeated or swapped."""
    # No NUL, which the operating system does not pass, and no help, which is no error.
    values = [str(v).replace("\0", "") for v in VALUES if type(v) in (str, float, bool, type(None))]
    values += ["-1", "0", "1e1", "9" * 30, "--", "-", "=", "[1]", "\udcff", "nothing.py", "."]
    result = list(arguments)
    for _ in range(rng.choice((1, 1, 2, 4))):
        position = rng.randrange(len(result) + 1)
        kind = rng.choice(("value", "option", "option", "remove", "repeat", "swap", "misspell"))
        if kind == "value":
            result[position : position + 1] = [rng.choice(values)]
        elif kind == "option":
            result += [rng.choice(options), *rng.choices(values, k=rng.choice((0, 1, 1, 1, 2)))]
        elif kind == "remove":
            del result[position : position + 1]
        elif kind == "repeat":
            result[position:position] = result[position : position + 2]
        elif kind == "swap":
            rng.shuffle(result)
        elif result:
            word = rng.choice(result)
            result[result.index(word)] = word[:1] + word[2:]
    return result
