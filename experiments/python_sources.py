"""Collects the Python sources of this machine as JSON lines: text of any size without a download.

    python experiments/python_sources.py --out sources
    python experiments/python_sources.py --out sources --folders /usr/lib/python3 ~/envs

By default the standard library and the installed packages of the running Python; more folders may
be named. Exact duplicates are removed by the hash of their content before files are assigned to a
split by that hash, so no file of one split is in another. Licenses are those of the packages.
"""

import dataclasses
import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import tyro

SHARD_BYTES = 16 << 20
"""Text of one file of JSON lines."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to collect."""

    out: Path  # folder for SPLIT/00000.jsonl
    folders: tuple[Path, ...] = ()  # besides the standard library and installed packages
    max_bytes: int | None = None  # of text; None: all
    valid_bytes: int = 1_000_000  # of the splits valid and test, about
    max_file: int = 1 << 20  # larger files are tables


class Shards:
    """Writes the documents of a split to files of about `SHARD_BYTES`."""

    def __init__(self, folder: Path):
        self._folder, self._size, self._number = folder, SHARD_BYTES, 0
        self._file = None
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, document: dict[str, str]) -> None:
        """Appends one document."""
        if self._size >= SHARD_BYTES:
            self.close()
            self._file = open(self._folder / f"{self._number:05}.jsonl", "w", encoding="utf-8")
            self._number, self._size = self._number + 1, 0
        assert self._file is not None
        self._file.write(json.dumps(document, ensure_ascii=False) + "\n")
        self._size += len(document["text"])

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def sources(args: Arguments) -> Iterator[tuple[str, bytes, bytes]]:
    """(name, text, hash) of every file of text, each content once."""
    seen: set[bytes] = set()
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    for folder in [*folders, *args.folders]:
        for path in sorted(folder.expanduser().rglob("*.py")):
            if not path.is_file() or not 0 < path.stat().st_size <= args.max_file:
                continue
            data = path.read_bytes()
            digest = hashlib.sha256(data).digest()
            if digest not in seen and _is_text(data):
                seen.add(digest)
                yield str(path.relative_to(folder)), data, digest


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:  # an old encoding
        return False
    return True


def main(args: Arguments) -> None:
    """Writes all splits and prints their sizes."""
    # Two passes: the share of the splits valid and test needs the total size.
    total = sum(len(data) for _, data, _ in sources(args))
    limit = min(total, args.max_bytes or total)
    share = round(args.valid_bytes / limit * 2**32)
    shards = {split: Shards(args.out / split) for split in ("train", "valid", "test")}
    sizes: Counter[str] = Counter()
    for name, data, digest in sources(args):
        if sum(sizes.values()) >= limit:
            break
        draw = int.from_bytes(digest[:4], "big")
        split = "valid" if draw < share else "test" if draw < 2 * share else "train"
        shards[split].write({"text": data.decode(), "name": name})
        sizes[split] += len(data)
    for split, writer in shards.items():
        writer.close()
        print(f"{split}: {sizes[split]:,} bytes")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
