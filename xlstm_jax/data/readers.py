"""Files to documents, and documents to the three splits."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from xlstm_jax.config import ConfigError
from xlstm_jax.data.config import SPLITS, Split

LAYOUT = (
    "a text file, or a folder with files that match data.pattern={pattern!r}, "
    "loose or in subfolders train/, valid/ and test/"
)


class Document(NamedTuple):
    """One text, and a name that does not depend on where its folder lies."""

    name: str
    data: bytes


class Corpus(NamedTuple):
    """Documents by split, in a fixed order."""

    name: str
    documents: dict[Split, list[Document]]

    def describe(self) -> dict[str, Any]:
        """Counts by split, and one hash over names and contents of the whole source list."""
        digest = hashlib.sha256()
        for split, documents in self.documents.items():
            for document in documents:
                content = hashlib.sha256(document.data).hexdigest()
                digest.update(f"{split} {content} {document.name}\n".encode())
        data = {split: [d.data for d in docs] for split, docs in self.documents.items()}
        return {
            "source": self.name,
            "sha256": digest.hexdigest(),
            "num_documents": {split: len(texts) for split, texts in data.items()},
            "num_bytes": {split: sum(map(len, texts)) for split, texts in data.items()},
        }


def read_folder(
    folder: Path, patterns: Iterable[str], skip: frozenset[str] = frozenset()
) -> Iterator[Document]:
    """Files below `folder` that match, in the order of their paths; empty ones are left out.

    Folders named in `skip`, hidden ones and links to folders are not entered.
    """
    patterns = tuple(patterns)
    for parent, folders, files in os.walk(folder):
        # Sorting in place fixes the order of the walk, which is the file system's otherwise.
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if any(path.match(pattern) for pattern in patterns) and path.is_file():
                if data := path.read_bytes():
                    yield Document(path.relative_to(folder).as_posix(), data)


def split_of(data: bytes) -> Split:
    """Train, valid or test (90/5/5) by the hash of a document's content.

    A document stays where it is when others are added or it is renamed, and copies of a text
    never end up on both sides.
    """
    share = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") % 100
    return "train" if share < 90 else "valid" if share < 95 else "test"


def split_by_hash(name: str, documents: Iterable[Document]) -> Corpus:
    """The documents dealt out by `split_of`."""
    splits: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        splits[split_of(document.data)].append(document)
    return Corpus(name, splits)


def read_path(source: str, pattern: str) -> Corpus:
    """The text at a path of the user's.

    A folder with train/, valid/ and test/ is read as it is, any other folder is split by
    `split_of`, and a single file in its order, 90/5/5, at the ends of lines.

    Raises:
        ConfigError: nothing to read there; names the expected layout.
    """
    path = Path(source).expanduser()
    if path.is_file():
        data = path.read_bytes()
        bounds = [0]
        for percent in (90, 95):
            end = data.find(b"\n", len(data) * percent // 100)
            bounds.append(len(data) if end < 0 else end + 1)
        parts = [data[start:stop] for start, stop in pairwise([*bounds, len(data)])]
        documents: dict[Split, list[Document]] = {
            split: [Document(f"{path.name}:{split}", part)] if part else []
            for split, part in zip(SPLITS, parts, strict=True)
        }
        corpus = Corpus(source, documents)
    elif all((path / split).is_dir() for split in SPLITS):
        documents = {split: list(read_folder(path / split, [pattern])) for split in SPLITS}
        corpus = Corpus(source, documents)
    else:
        corpus = split_by_hash(source, read_folder(path, [pattern]))
    if not any(corpus.documents.values()):
        layout = LAYOUT.format(pattern=pattern)
        raise ConfigError(f"data.source={source!r} holds no text; it must be {layout}.")
    return corpus
