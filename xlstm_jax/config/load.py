"""Configs from files: a CONFIG.py, a config.json, or a run."""

import pathlib
from collections.abc import Mapping
from typing import TypeVar

from xlstm_jax.config import user_code
from xlstm_jax.config.fields import IMPORTS, from_dict
from xlstm_jax.config.files import read_json, user_path
from xlstm_jax.errors import ConfigError, quote, quote_path

T = TypeVar("T")


def call_function(
    path: pathlib.Path, cls: type[T], size: str | None = None, name: str = "config"
) -> T:
    """What the function `name` of a Python file returns, with `size` as its argument if any.

    Raises:
        ConfigError: the file has no such function, it raises an error, or it returns something
            other than a `cls`.
    """
    value = user_code.call_config(path, size, cls, name)
    if not isinstance(value, cls):
        raise ConfigError(
            f"{name}() of {quote_path(path)} must return {cls.__name__}, got "
            f"{type(value).__name__}."
        )
    return value


def load_config(path: str | pathlib.Path, cls: type[T], size: str | None = None) -> T:
    """Loads a config from a file.

    Args:
        path: a Python file that defines `config(size=...)`, a `config.json`, or a run directory.
            The folder of a Python file is first on `sys.path` while it runs.
        size: argument of `config`; None uses its default.

    Raises:
        ConfigError: the file is missing, is not a config, or describes something other than `cls`.
    """
    path = user_path(path)
    if path.is_dir():
        path = path / "config.json"
    shown = quote_path(path)
    if not path.is_file():
        raise ConfigError(f"{shown} does not exist; pass a CONFIG.py or a run directory.")
    if path.suffix not in (".py", ".json"):
        raise ConfigError(
            f"{shown} is neither a .py nor a .json file; pass a CONFIG.py or a config.json."
        )
    if path.suffix == ".py":
        return call_function(path, cls, size)
    if size is not None:
        raise ConfigError(
            f"size={quote(size)} applies to a CONFIG.py only, got {shown}; leave it out."
        )
    values = read_json(path)
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        # The recorded modules are never imported from here: a file must not run code.
        names = values.get(IMPORTS) if isinstance(values, Mapping) else None
        names = names if isinstance(names, list) else []
        flags = " ".join(
            f"--import {quote_path(x)}" for x in map(str, names) if x not in user_code.imported
        )
        if not flags:
            raise ConfigError(f"{shown}: {error}") from error
        raise ConfigError(f"{shown} needs {flags}, which it was written with: {error}") from error
