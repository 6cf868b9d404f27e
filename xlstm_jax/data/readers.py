"""Reading of files as documents, and their assignment to the three splits."""

import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xlstm_jax.config import ConfigError
from xlstm_jax.data import files
from xlstm_jax.data.config import SPLITS, Split
from xlstm_jax.data.splits import divide, split_by_content, splits_by_name, splits_of_name
from xlstm_jax.errors import printable, quote, quote_path

_log = logging.getLogger(__name__)


class Document(NamedTuple):
    """One text, with a name that does not depend on the location of its folder."""

    name: str
    data: bytes


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
            "sha256": with_names.hexdigest(),  # alone in runs of earlier versions
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


def read_path(source: str, pattern: str | None) -> Corpus:
    """Reads the text at a path, with the splits that names of files and folders define.

    If they define none, documents are split by `split_by_content`, and a single document, such as a
    file given as `source`, by `divide`.

    Raises:
        ConfigError: the path has no text, a file cannot be read, or the splits are ambiguous.
    """
    documents, named = _read(source, pattern)
    if named is not None:
        return Corpus(source, _by_name(source, documents, named))
    if len(documents) > 1:
        return split_by_hash(source, documents)
    parts = _divide(documents, (90, 95))
    return Corpus(source, dict(zip(SPLITS, parts, strict=True)))


def read_all(source: str, pattern: str | None) -> Corpus:
    """As `read_path`, with the documents of every split, undivided, as the one split "all"."""
    return Corpus(source, {"all": _read(source, pattern)[0]})


def find(source: str) -> Path | None:
    """The file or folder at a path, in which ~ is the home directory; None if there is none."""
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # ~name of a user without a home directory
        return None
    return path if os.path.exists(path) else None  # False, too, for names that cannot exist


def _read(source: str, pattern: str | None) -> tuple[list[Document], dict[str, Split] | None]:
    """The non-empty documents at a path, and their splits if names define them."""
    path, named = find(source), None
    if path is not None and path.is_dir():
        names = _names(source, path, pattern)
        named = _names_to_splits(source, names)
        paths = {name: path / name for name in named or names}
    elif path is not None and path.is_file():
        if files.suffix(path.name) in files.ROWS and not _is_asked_for(path.name, pattern):
            raise ConfigError(_rows_message(source, path.name, f"*{path.suffix}"))
        paths = {path.name: path}
    else:
        raise ConfigError(f"data.source={quote(source)} must be a regular file or a folder.")
    documents, left = [], files.MAX_BYTES
    for name, file in paths.items():
        data = files.read_text(file, left, any_bytes=_is_asked_for(name, pattern))
        left -= len(data)
        documents += [Document(name, data)] if data else []
    if not documents:
        raise ConfigError(
            f"data.source={quote(source)} contains no text: {files.count_suffixes(list(paths))} "
            "are empty; add text."
        )
    return documents, named


def _names(source: str, folder: Path, pattern: str | None) -> list[str]:
    """The files of a folder to read; names the others if the pattern does not exclude them."""
    every = list(files.walk(folder))
    names = [name for name in every if files.matches(name, pattern)]
    rows = [n for n in every if pattern is None and files.suffix(n) in files.ROWS]
    # Else they are metadata beside the text. A README beside a data set of rows is not its text.
    if rows and _num_bytes(folder, rows) >= _num_bytes(folder, names):
        raise ConfigError(_rows_message(source, rows[0], "*.{txt,md}"))
    if not names:
        raise ConfigError(
            f"data.source={quote(source)} must be a text file or a folder with files that match "
            f"data.pattern={quote(pattern)} (None: {files.FORMATS}), but it has "
            f"{files.count_suffixes(every)}; hidden files are skipped. Correct one of them."
        )
    if pattern is None and len(names) < len(every):
        others = files.count_suffixes(sorted(set(every) - set(names)))
        _warn_once(f"data.source={quote(source)}: {others} are not text and are skipped")
    return names


def _num_bytes(folder: Path, names: Iterable[str]) -> int:
    return sum((folder / name).stat().st_size for name in names)


def _rows_message(source: str, name: str, pattern: str) -> str:
    return (
        f"data.source={quote(source)} must be text ({files.FORMATS}), but {quote_path(name)} holds "
        f"rows of data, which are not read yet; set data.pattern={quote(pattern)} to select what "
        "is read as text."
    )


def _is_asked_for(name: str, pattern: str | None) -> bool:
    return pattern is not None and files.matches(name, pattern)


def _names_to_splits(source: str, names: list[str]) -> dict[str, Split] | None:
    """`splits_by_name`, with a warning about files that it ignores."""
    named = splits_by_name(names)
    if named is None:
        ignored = [name for name in names if splits_of_name(name)]
        why = "name a split but are split like all others, as no file names 'train'"
    else:
        ignored = [name for name in names if name not in named]
        why = "name no split and are skipped"
    if ignored:
        examples = ", ".join(map(quote_path, ignored[:3]))
        _warn_once(f"data.source={quote(source)}: {len(ignored)} files {why}: {examples}")
    return named


def _by_name(
    source: str, documents: list[Document], named: dict[str, Split]
) -> dict[str, list[Document]]:
    """Documents by the split that they name; an absent "valid" is taken out of "train"."""
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for name, data in documents:
        split = named[name]
        # Names relative to train/: descriptions of earlier versions have them.
        splits[split].append(Document(name.removeprefix(f"{split}/"), data))
    if "valid" in named.values() or not splits["train"]:
        return splits
    by_hash = [split_by_content(document.data) == "valid" for document in splits["train"]]
    if any(by_hash) and not all(by_hash):
        pairs = list(zip(splits["train"], by_hash, strict=True))
        train, valid = ([d for d, is_valid in pairs if is_valid == v] for v in (False, True))
        scope = f"{len(valid)} of the {len(by_hash)} documents"
    else:  # too few documents
        train, valid = _divide(splits["train"], (95,))
        scope = "the last 5 % of every document"
    _warn_once(f"data.source={quote(source)} names no split 'valid': it is {scope} of 'train'")
    return splits | {"train": train, "valid": valid}


def _divide(documents: list[Document], percents: tuple[int, ...]) -> list[list[Document]]:
    """Divides every document by `divide`; the parts of a split are the first, second, ... ones."""
    parts: list[list[Document]] = [[] for _ in range(len(percents) + 1)]
    for document in documents:
        for part, split, data in zip(parts, SPLITS, divide(document.data, percents), strict=False):
            part += [Document(f"{document.name}:{split}", data)] if data else []
    return parts


@functools.lru_cache(maxsize=1000)
def _warn_once(message: str) -> None:
    """Logs a warning; every split of a source is loaded on its own and would repeat it."""
    _log.warning("%s", printable(message))
