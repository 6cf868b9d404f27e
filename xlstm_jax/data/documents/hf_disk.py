"""Data sets that the package `datasets` saved to disk: a folder with state.json, or one a split."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xlstm_jax.errors import ConfigError, quote, quote_path

_MAX_BYTES = 16 << 20  # of a JSON file


def without_metadata(folder: Path, names: Sequence[str]) -> list[str]:
    """The names of data: without state and info files and caches of `map`.

    Raises:
        ConfigError: a file or split of such a data set is absent.
    """
    present, skipped = set(names), set[str]()
    for name in names:
        parent, _, file = name.rpartition("/")
        prefix = f"{parent}/" if parent else ""
        if file == "state.json":
            data = _listed(folder / name, "_data_files", "filename")
        elif file == "dataset_dict.json":
            data = [f"{split}/state.json" for split in _listed(folder / name, "splits") or ()]
            skipped.add(name)
        else:
            continue
        absent = [listed for listed in data or () if prefix + listed not in present]
        if absent:
            raise ConfigError(
                f"{quote_path(folder / name)} lists {quote(absent[0])}, which does not exist; copy "
                "the data set again."
            )
        if data and file == "state.json":
            siblings = {other for other in names if other.rpartition("/")[0] == parent}
            skipped |= siblings - {prefix + listed for listed in data}
    return [name for name in names if name not in skipped]


def _listed(path: Path, key: str, field: str | None = None) -> list[str] | None:
    """The strings that a JSON file lists; None if it is a file of another kind."""
    if path.stat().st_size > _MAX_BYTES:
        return None
    try:
        value: Any = json.loads(path.read_bytes())
        entries = [entry[field] if field else entry for entry in value[key]]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return entries if all(isinstance(entry, str) for entry in entries) else None
