"""Selection of the files of a source, and the rules by which they are split."""

import functools
import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from xlstm_jax.data.documents import files, hf_disk
from xlstm_jax.data.documents.document import File, Split
from xlstm_jax.data.documents.reader import read
from xlstm_jax.data.documents.splits import splits_by_name, splits_of_name
from xlstm_jax.data.documents.streams import read_blocks
from xlstm_jax.errors import ConfigError, printable, quote, quote_path

_log = logging.getLogger(__name__)


def find(source: str) -> Path | None:
    """The file or folder at a path, in which ~ is the home directory; None if it does not exist."""
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # ~name of a user without a home directory
        return None
    return path if os.path.exists(path) else None  # False, too, for names that cannot exist


def find_files(
    source: str, pattern: str | None = None, *, split: Split | None = None
) -> list[File]:
    """The files of a source in a fixed order, each with the rule that splits its documents.

    Names define the splits where `splits_by_name` finds any. Otherwise documents, which are text
    files or records, are split by `split_by_content`; a single text is divided by position.

    Args:
        split: of all documents; names are ignored.

    Raises:
        ConfigError: the path has no data, or the splits are ambiguous.
    """
    selected, named = select(source, pattern, use_names=split is None)
    if split is not None:
        return [_with_split(file, split) for file in selected]
    assigned = assign(selected, named)
    if scope := scope_of_valid(assigned):
        warn_once(f"data.source={quote(source)} names no split 'valid': it is {scope} of 'train'")
    return assigned


def select(
    source: str, pattern: str | None, *, use_names: bool = True
) -> tuple[list[File], dict[str, Split] | None]:
    """The files of a source that are read, without splits, and the splits if names define them."""
    path, named = find(source), None
    if path is not None and path.is_dir():
        names = _names(source, path, pattern)
        named = _names_to_splits(source, names) if use_names else None
        paths = {name: path / name for name in names}
    elif path is not None and path.is_file():
        paths = {path.name: path}  # the pattern is for folders
    else:
        reason = "does not exist" if path is None or not path.exists() else "is neither"
        raise ConfigError(
            f"data.source={quote(source)} must be a regular file or a folder, but {reason}; check "
            "the path."
        )
    selected = [
        File(
            name,
            str(file),
            file.stat().st_size,
            None,
            is_selected=pattern is not None and files.matches(name, pattern),
        )
        for name, file in paths.items()
    ]
    check_not_empty(source, selected, any(file.size for file in selected))
    return [file for file in selected if named is None or file.name in named], named


def check_not_empty(source: str, selected: Sequence[File], has_text: object) -> None:
    """Raises ConfigError if no file has any text."""
    if not has_text:
        raise ConfigError(
            f"data.source={quote(source)} contains no text: "
            f"{files.count_suffixes([file.name for file in selected])} are empty; add text."
        )


def assign(selected: Sequence[File], named: dict[str, Split] | None) -> list[File]:
    """The files of `select`, each with the rule that splits its documents."""
    if named is None:
        is_divided = not _has_records(selected) and not _has_two_texts(selected)
        return [file._replace(is_divided=is_divided) for file in selected]
    if "valid" in named.values():
        return [_with_split(file, named[file.name]) for file in selected]
    train = [
        file._replace(splits=("train", "valid")) for file in selected if named[file.name] == "train"
    ]
    is_divided = not _has_records(train) and not _has_two_splits(train)
    rules = {file.name: file._replace(is_divided=is_divided) for file in train}
    return [rules.get(file.name) or _with_split(file, named[file.name]) for file in selected]


def scope_of_valid(assigned: Iterable[File]) -> str | None:
    """The part of "train" that is the split "valid"; None if it is not taken from it."""
    is_divided = next((file.is_divided for file in assigned if len(file.splits) == 2), None)
    if is_divided is None:
        return None
    return "the last 5 % of every document" if is_divided else "5 % of the documents"


def _with_split(file: File, split: Split) -> File:
    return file._replace(split=split, splits=(split,))


def _has_records(selected: Iterable[File]) -> bool:
    return any(files.suffix(file.name) in files.RECORDS for file in selected)


def _has_two_texts(texts: Iterable[File]) -> bool:
    """Whether at least two files are not empty, which a compressed one shows when it is read."""
    texts = (file for file in texts if file.size and next(read_blocks(file.path), b""))
    return len(list(itertools.islice(texts, 2))) == 2


def _has_two_splits(texts: Iterable[File]) -> bool:
    """Whether the content assigns texts to "train" and to "valid"."""
    first = None
    for file in texts:
        for split, _ in itertools.islice(read(file), 1):
            if first not in (None, split):
                return True
            first = split
    return False


def _names(source: str, folder: Path, pattern: str | None) -> list[str]:
    """The files of a folder to read; names the others if the pattern does not exclude them."""
    every = list(files.walk(folder))
    data = hf_disk.without_metadata(folder, every)
    matching = [name for name in data if files.matches(name, pattern)]
    if not matching:
        raise ConfigError(
            f"data.source={quote(source)} must be a text file or a folder with files that match "
            f"data.pattern={quote(pattern)} (None: {files.FORMATS}), but it has "
            f"{files.count_suffixes(every)}; hidden files are skipped. Correct one of them."
        )
    if pattern is not None:
        return matching
    names = _without_descriptions(folder, matching)
    for others, why in (
        (set(data) - set(matching), "are not text and are skipped"),
        (
            set(matching) - set(names),
            "describe the data beside them and are skipped; data.pattern selects them",
        ),
    ):
        if others:
            warn_once(f"data.source={quote(source)}: {files.count_suffixes(sorted(others))} {why}")
    return names


def _without_descriptions(folder: Path, names: list[str]) -> list[str]:
    """The names without .json beside larger data, and without a README beside larger records."""
    objects = [name for name in names if files.suffix(name) == ".json"]
    if objects and _num_bytes(folder, objects) < _num_bytes(folder, set(names) - set(objects)):
        names = [name for name in names if name not in set(objects)]
    readmes = [name for name in names if files.suffix(name) in files.TEXT and _is_readme(name)]
    records = [name for name in names if files.suffix(name) in files.RECORDS]
    if records and readmes and _num_bytes(folder, readmes) <= _num_bytes(folder, records):
        names = [name for name in names if name not in set(readmes)]
    return names


def _is_readme(name: str) -> bool:
    return files.suffix(name) == ".md" or PurePath(name.lower()).stem in ("readme", "license")


def _num_bytes(folder: Path, names: Iterable[str]) -> int:
    return sum((folder / name).stat().st_size for name in names)


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
        count = f"{len(ignored)} of {len(names)} files"
        warn_once(f"data.source={quote(source)}: {count} {why}: {examples}")
    return named


@functools.lru_cache(maxsize=1000)
def warn_once(message: str) -> None:
    """Logs a warning; every split of a source is loaded on its own and would repeat it."""
    _log.warning("%s", printable(message))
