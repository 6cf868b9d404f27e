"""Input shards: groups of files that are tokenized together, a pure function of the listing."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from xlstm_jax.data.documents.document import File
from xlstm_jax.data.documents.files import RECORDS, suffix

MAX_GROUP = 64 << 20
"""Bytes of the text files in one input shard: many small files share a shard."""


class InputShard(NamedTuple):
    """Files that become the output shards with the same number."""

    number: int
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)


def input_shards(files: Sequence[File]) -> list[InputShard]:
    """A shard for every file of records, and for consecutive text files of at most 64 MiB."""
    return [InputShard(number, tuple(group)) for number, group in enumerate(_groups(files))]


def _groups(files: Sequence[File]) -> Iterator[list[File]]:
    group: list[File] = []
    size = 0
    for file in files:
        if group and (_has_records(file) or size + file.size > MAX_GROUP):
            yield group
            group, size = [], 0
        group.append(file)
        size += file.size
        if _has_records(file):
            yield group
            group, size = [], 0
    if group:
        yield group


def listing_sha256(files: Sequence[File]) -> str:
    """A hash of the names and sizes of files, in order, and of the rules that split them."""
    digest = hashlib.sha256()
    for file in files:
        # Without the path, so that a copy elsewhere is the same.
        rule = f"{file.size} {file.split} {file.splits} {file.is_divided} "
        digest.update(rule.encode() + os.fsencode(file.name) + b"\n")
    return digest.hexdigest()


def _has_records(file: File) -> bool:
    return suffix(file.name) in RECORDS
