"""Fits as a JSON file, in full precision, as rounded coefficients predict other losses."""

import json
import math
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax.config import read_json
from xlstm_jax.errors import ConfigError, quote, quote_path
from xlstm_jax.scaling.fitting import Fits


def save(fits: Fits, path: str | Path) -> None:
    """Writes fits as JSON; NaN becomes null."""
    Path(path).write_text(json.dumps(_encode(fits), indent=1, allow_nan=False) + "\n")


def load(path: str | Path) -> Fits:
    """Reads what `save` wrote.

    Raises:
        ConfigError: the file is missing or is not a fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"{quote_path(path)} does not exist; write it with `xlstm-jax fit TABLE --out DIR`."
        )
    try:
        return _decode(Fits, read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{quote_path(path)} is not a fit ({quote(str(error))}); write it again with "
            "`xlstm-jax fit`."
        ) from error


def _encode(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: _encode(item) for name, item in value._asdict().items()}  # pyright: ignore
    if isinstance(value, np.ndarray):
        return _encode(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _encode(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _decode(hint: Any, value: Any) -> Any:
    """The value that `_encode` made from one of the annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # only `X | None`
        return None if value is None else _decode(arguments[0], value)
    if hasattr(hint, "_fields"):
        hints = typing.get_type_hints(hint)
        return hint(**{name: _decode(hints[name], value[name]) for name in hint._fields})
    if origin is tuple:
        items = arguments if arguments[-1] is not ... else arguments[:1] * len(value)
        return tuple(_decode(item, x) for item, x in zip(items, value, strict=True))
    if origin is dict:
        return {name: _decode(arguments[1], item) for name, item in value.items()}
    if isinstance(hint, type) and hasattr(hint, "array_type"):  # of jaxtyping
        array = np.array(value, np.float64)
        return array if array.size else np.zeros((0, 6))  # `LossSurface.samples` may be empty
    if hint is float:
        return math.nan if value is None else float(value)
    return value
