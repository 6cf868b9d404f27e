"""The output folder: what may be in it, what `fresh` deletes, and its manifest."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from xlstm_jax.config import user_path
from xlstm_jax.data.config import SPLITS
from xlstm_jax.data.prepare import ledger
from xlstm_jax.data.prepare.config import Share
from xlstm_jax.data.shards.manifest import (
    NAME,
    SUFFIXES,
    TOKENIZER_FOLDER,
    Manifest,
    file_sizes,
    shard_path,
    to_json,
)
from xlstm_jax.data.shards.writer import DRAFT
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import ConfigError, quote_path

_FILES = re.compile(
    rf"({'|'.join(SPLITS)})/[0-9]{{5,}}\.(bin|ends|loss)(\.tmp)?|{ledger.FOLDER}/\d+-of-\d+\.jsonl|"
    rf"{TOKENIZER_FOLDER}(\.\d+-of-\d+\.tmp)?/[^/]+|manifest\.json(\.\d+-of-\d+\.tmp)?"
)
"""Every file that `prepare` writes."""


def check(source: str, out: Path) -> None:
    """Checks, before anything is written, that `out` can be the folder of prepared data.

    Raises:
        ConfigError: it is not a local folder, is within the source, or has other files.
    """
    if "://" in str(out) or re.match(r"[a-z0-9]+:/", str(out)):
        raise ConfigError(f"OUT must be a local folder, got {quote_path(out)}; copy it afterwards.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"OUT must be a folder, but {quote_path(out)} is a file; choose another.")
    path = user_path(source)
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            f"OUT must not be within the input, got {quote_path(out)} in {quote_path(path)}; "
            "choose a folder beside it."
        )
    for name in _files(out):
        if not _FILES.fullmatch(name):
            raise ConfigError(
                f"OUT must be new, empty, or have prepared data only, but {quote_path(out)} has "
                f"{quote_path(name)}; choose another folder."
            )


def _files(out: Path) -> Iterator[str]:
    """Relative paths of the files in a folder; hidden ones belong to the file system."""
    for parent, folders, names in os.walk(out):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield Path(parent, name).relative_to(out).as_posix()


def clear(out: Path) -> None:
    """Deletes all that `prepare` wrote to a folder that `check` accepts.

    Raises:
        ConfigError: a process prepares data in it, or the folder is not prepared data.
    """
    names = sorted(_files(out))
    if names and not any(n == NAME or n.startswith(f"{ledger.FOLDER}/") for n in names):
        raise ConfigError(
            f"--fresh deletes prepared data only, but {quote_path(out)} has neither {NAME} nor "
            f"{ledger.FOLDER}/; choose another folder."
        )
    ledger.check_unused(out)
    # The manifest first: without it, the rest is not taken for complete data.
    for name in sorted(names, key=lambda name: name != NAME):
        (out / name).unlink(missing_ok=True)
    for folder in (*SPLITS, ledger.FOLDER, TOKENIZER_FOLDER):
        with contextlib.suppress(OSError):  # absent
            (out / folder).rmdir()


def is_complete(out: Path, entry: ledger.Entry, dtype: str) -> bool:
    """Whether the files of a finished shard still exist, with their sizes."""
    return all(
        _size(out / shard_path(split, info.name, suffix)) == size
        for split, info in entry.shards.items()
        for suffix, size in file_sizes(info, dtype).items()
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def remove_drafts(out: Path, name: str) -> None:
    """Deletes what a worker that was stopped has written of a shard."""
    for split in SPLITS:
        for suffix in SUFFIXES:
            (out / shard_path(split, name, suffix + DRAFT)).unlink(missing_ok=True)


def write_manifest(out: Path, manifest: Manifest, tokenizer: Tokenizer, share: Share) -> None:
    """Writes the tokenizer, then the manifest, each by a rename.

    Several processes may do so at once: they write the same bytes, under draft names of their own.
    """
    draft = f".{share.index}-of-{share.count}.tmp"
    folder = out / f"{TOKENIZER_FOLDER}{draft}"
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process
    folder.mkdir()
    tokenizer.save(folder)
    try:
        if any(folder.iterdir()):
            folder.rename(out / TOKENIZER_FOLDER)
    except OSError:
        if not (out / TOKENIZER_FOLDER).is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    path = out / f"{NAME}{draft}"
    with open(path, "w", encoding="utf-8") as file:
        file.write(to_json(manifest))
        file.flush()
        os.fsync(file.fileno())
    path.replace(out / NAME)
