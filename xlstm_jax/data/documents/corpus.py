"""Documents of a source in memory, by split, and their identity."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from xlstm_jax.data.documents.document import SPLITS, Document, File, Split
from xlstm_jax.data.documents.files import RECORDS, suffix
from xlstm_jax.data.documents.reader import read
from xlstm_jax.data.documents.select import (
    assign,
    check_not_empty,
    scope_of_valid,
    select,
    warn_once,
)
from xlstm_jax.data.documents.splits import split_by_content
from xlstm_jax.errors import ConfigError, quote, quote_path

MAX_BYTES = 1 << 30
"""Bytes of text in a source, decompressed, because tokens are stored in memory."""


class Corpus(NamedTuple):
    """The documents of each split, in a fixed order."""

    name: str
    documents: Mapping[str, list[Document]]

    def describe(self) -> dict[str, Any]:
        """Counts per split, and hashes over all documents: with their names, and without."""
        # Of all splits: a document that moves between them changes every description.
        with_names, contents = hashlib.sha256(), hashlib.sha256()
        for split, documents in self.documents.items():
            for document in documents:
                line = f"{split} {hashlib.sha256(document.data).hexdigest()}"
                contents.update(f"{line}\n".encode())
                with_names.update(f"{line} ".encode() + os.fsencode(document.name) + b"\n")
        data = {split: [d.data for d in docs] for split, docs in self.documents.items()}
        return {
            "sha256": with_names.hexdigest(),  # the only hash in runs of earlier versions
            "content_sha256": contents.hexdigest(),
            "num_documents": {split: len(texts) for split, texts in data.items()},
            "num_bytes": {split: sum(map(len, texts)) for split, texts in data.items()},
        }


def split_by_hash(name: str, documents: Iterable[Document]) -> Corpus:
    """A corpus whose documents are assigned to splits by `split_by_content`."""
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        splits[split_by_content(document.data)].append(document)
    return Corpus(name, splits)


def read_path(source: str, pattern: str | None, text_field: str = "text") -> Corpus:
    """Reads the documents of a path into memory, with the splits that `find_files` defines.

    Args:
        text_field: the field or column with the text of a record.

    Raises:
        ConfigError: the path has no text or more than `MAX_BYTES`, a file cannot be read, or the
            splits are ambiguous.
    """
    selected, named = select(source, pattern)
    assigned = assign(selected, named)
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for file, split, document in _read(source, assigned, text_field):
        if named is not None:
            # Names relative to train/: descriptions of earlier versions have them.
            document = document._replace(name=document.name.removeprefix(f"{file.splits[0]}/"))
        splits[split].append(document)
    if splits["train"] and (scope := scope_of_valid(assigned)):
        if not any(file.is_divided for file in assigned):
            count = len(splits["valid"])
            scope = f"{count} of the {count + len(splits['train'])} documents"
        warn_once(f"data.source={quote(source)} names no split 'valid': it is {scope} of 'train'")
    return Corpus(source, splits)


def read_all(source: str, pattern: str | None, text_field: str = "text") -> Corpus:
    """As `read_path`, with the documents of every split, undivided, as the one split "all"."""
    selected = [file._replace(split="train") for file in select(source, pattern)[0]]
    return Corpus(source, {"all": [doc for _, _, doc in _read(source, selected, text_field)]})


def _read(
    source: str, assigned: Iterable[File], text_field: str
) -> Iterator[tuple[File, Split, Document]]:
    """The documents of files, each in one piece; raises ConfigError if none or too many bytes."""
    assigned, left, is_empty = list(assigned), MAX_BYTES, True
    for file in assigned:
        _check_size(file, left - file.size * (suffix(file.name) not in RECORDS))
        parts: list[bytes] = []
        for split, document in read(file, text_field=text_field):
            parts.append(document.data)
            left -= len(document.data)
            _check_size(file, left)
            if document.is_last:
                is_empty = False
                yield file, split, document._replace(data=b"".join(parts))
                parts = []
    check_not_empty(source, assigned, not is_empty)


def _check_size(file: File, left: int) -> None:
    if left < 0:
        raise ConfigError(
            f"the text of data.source must be at most {MAX_BYTES >> 20:,} MiB, as its tokens are "
            f"stored in memory, but {quote_path(file.path)} exceeds that; tokenize it with "
            "`xlstm-jax data prepare`, or use fewer or smaller files."
        )
