"""Reading of files as documents, and their assignment to the three splits."""

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
    """One text, with a name that does not depend on the location of its folder."""

    name: str
    data: bytes


class Corpus(NamedTuple):
    """The documents of each split, in a fixed order."""

    name: str
    documents: dict[Split, list[Document]]

    def describe(self) -> dict[str, Any]:
        """Counts per split, and one hash over the names and contents of all documents."""
        # Of all splits: a document that moves between them changes every description.
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
    """The non-empty files below `folder` that match a pattern, in the order of their paths.

    Folders named in `skip`, hidden folders and links to folders are not entered.
    """
    patterns = tuple(patterns)
    for parent, folders, files in os.walk(folder):
        # Sorting in place fixes the order of the walk, which otherwise depends on the file system.
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if any(path.match(pattern) for pattern in patterns) and path.is_file():
                if data := path.read_bytes():
                    yield Document(path.relative_to(folder).as_posix(), data)


def split_of(data: bytes) -> Split:
    """Assigns a document to train, valid or test (90/5/5) by the hash of its content.

    A document keeps its split when others are added or it is renamed, and copies of a text always
    share a split.
    """
    # Eight bytes: the bias of the remainder, 100 / 2**64, is negligible.
    share = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") % 100
    return "train" if share < 90 else "valid" if share < 95 else "test"


def split_by_hash(name: str, documents: Iterable[Document]) -> Corpus:
    """A corpus whose documents are assigned to splits by `split_of`."""
    splits: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        splits[split_of(document.data)].append(document)
    return Corpus(name, splits)


def read_path(source: str, pattern: str) -> Corpus:
    """Reads the text at a path.

    A folder with train/, valid/ and test/ defines the splits. The documents of any other folder are
    split by `split_of`, and a single file is split 90/5/5 in order, at line ends.

    Raises:
        ConfigError: the path has no text; the message gives the expected layout.
    """
    path = Path(source).expanduser()
    if path.is_file():
        data = path.read_bytes()
        bounds = [0]
        for percent in (90, 95):
            # At line ends, so that no line, and no UTF-8 character, is split.
            end = data.find(b"\n", len(data) * percent // 100)
            bounds.append(len(data) if end < 0 else end + 1)  # no later line end: an empty split
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
        raise ConfigError(f"data.source={source!r} contains no text; it must be {layout}.")
    return corpus
