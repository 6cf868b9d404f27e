"""JSON files, and the paths that users write."""

import json
import os
import pathlib
from typing import Any

from xlstm_jax.errors import ConfigError, quote_path


def user_path(path: str | pathlib.Path) -> pathlib.Path:
    """The path with a leading "~" or "~user" replaced; ConfigError if that home does not exist."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{quote_path(path)} names a home directory that does not exist; write the full path."
        ) from error


CACHE_DIR = "XLSTM_CACHE_DIR"
"""Environment variable: the folder of this library's caches; `~/.cache/xlstm-jax` by default."""


def cache_dir() -> pathlib.Path | None:
    """The folder of this library's caches, which need not exist; None without a home directory."""
    try:
        return pathlib.Path(os.environ.get(CACHE_DIR) or "~/.cache/xlstm-jax").expanduser()
    except RuntimeError:  # as in a container whose user has none
        return None


def read_json(path: pathlib.Path) -> Any:
    """The contents of a JSON file; raises ConfigError if it is not valid JSON."""
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes, path: str | pathlib.Path) -> Any:
    """The value of JSON in UTF-8, read from `path`; raises ConfigError if it is not valid."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        message = f"{quote_path(path)} is not valid JSON ({reason}); restore it or fetch it again."
        raise ConfigError(message) from error
