"""Checks of frozen config dataclasses, and their conversion to JSON values and back.

A field may override its conversion in its metadata: `to_json` maps a value to a JSON value, which
is omitted when empty, `from_json` maps (JSON value, field name) back to the value, and
`is_recorded` tells, given the dataclass, whether the field is stored as JSON at all.
"""

import contextlib
import dataclasses
import difflib
import functools
import operator
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from xlstm_jax.errors import ConfigError, quote, quote_path

T = TypeVar("T")

IMPORTS = "imports"
"""Key of config.json that lists the modules its config needs. `from_dict` ignores it."""


def to_dict(cfg: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values: dataclasses become dicts, tuples become lists."""
    values = {}
    for field in dataclasses.fields(cfg):
        if not field.metadata.get("is_recorded", lambda cfg: True)(cfg):
            continue
        value = field.metadata.get("to_json", _to_json)(getattr(cfg, field.name))
        # Omitted when empty, so that a new field of this kind does not change old fingerprints.
        if value or "to_json" not in field.metadata:
            values[field.name] = value
    return values


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_json(item) for item in value]
    return str(value) if isinstance(value, pathlib.PurePath) else value


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """The inverse of `to_dict`; absent fields keep their defaults.

    Args:
        where: prefix of field names in error messages, such as "train.".

    Raises:
        ConfigError: a field is unknown or missing, a value has the wrong type, or `cls` rejects it.
    """
    kind: Any = cls
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where.rstrip('.') or cls.__name__} must be a table of fields, got {quote(values)}."
        )
    # `IMPORTS` is a key of the file, not a field, so it is dropped at the top level only.
    values = {name: value for name, value in values.items() if where or name != IMPORTS}
    if hasattr(kind, "upgrade"):  # renames fields of earlier versions
        values = kind.upgrade(values)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for name in values:
        if name not in fields:
            hint = did_you_mean(str(name), fields)
            raise ConfigError(
                f"{quote_path(f'{where}{name}')} is not a field of {cls.__name__}; {hint}"
            )
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}{name} has no default in {cls.__name__}; give it a value.")
    hints = type_hints(cls)
    arguments = {}
    for name, value in values.items():
        convert = fields[name].metadata.get("from_json", functools.partial(as_type, hints[name]))
        arguments[name] = convert(value, where + name)
    try:
        return cls(**arguments)
    except ValueError as error:
        # A class of a user may raise any ValueError; those of this library raise ConfigError.
        if isinstance(error, ConfigError) or cls.__module__.startswith("xlstm_jax."):
            raise
        raise ConfigError(str(error)) from error


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """A hint for an error about an unknown name: similar ones, else `otherwise`, else all known."""
    # Users remember the last part of a dotted name: lr for train.lr.
    near = [other for other in known if other.endswith("." + name.lstrip("-"))]
    near = near or difflib.get_close_matches(name, known)
    otherwise = otherwise or f"use one of: {', '.join(known)}."
    return f"did you mean {' or '.join(near)}?" if near else otherwise


type_hints = functools.cache(typing.get_type_hints)

# Numbers that float32 represents: others become inf, or 0 where subnormal numbers are flushed.
FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127

MAX_INT = 2**31 - 1
"""Largest size, count and token id: indices are int32."""

MAX_BITS = 512
"""Of any integer: Python refuses to write those of more than 4,300 digits to JSON."""

DEMANDS: dict[str, Callable[[Any], bool]] = {
    "at least 1": lambda x: x >= 1,
    "at least 2": lambda x: x >= 2,
    "at least 0": lambda x: x >= 0,
    "above 0": lambda x: x > 0,
    "above 1": lambda x: x > 1,
    "from 0 to 1": lambda x: 0 <= x <= 1,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    # The largest number that float32 does not round to 1.
    "at least 0 and below 1": lambda x: 0 <= x < 1 - 2**-25,
}
"""Demand on a number, as error messages spell it -> its check."""


def check_fields(cfg: Any, where: str, demands: Mapping[str, str]) -> None:
    """Checks the types and ranges of a dataclass in its `__post_init__`.

    NumPy scalars become Python numbers, and lists become tuples where the type says so.

    Args:
        where: prefix of field names in error messages, such as "train.".
        demands: a key of `DEMANDS` -> names of the fields that must satisfy it unless they are
            None. Integers among them may not exceed `MAX_INT`.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        converted = as_type(type_hints(type(cfg))[field.name], value, where + field.name)
        if converted is not value:
            object.__setattr__(cfg, field.name, converted)  # the dataclass is frozen
    for demand, names in demands.items():
        for name in names.split():
            has_default = hasattr(type(cfg), name)
            way_out = f"the default is {getattr(type(cfg), name)}" if has_default else "change it"
            check_range(where + name, getattr(cfg, name), demand, way_out)
    for name, value in vars(cfg).items():  # of integers without a range, such as seeds
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise ConfigError(
                f"{where}{name} must have at most {MAX_BITS} bits, got {quote(value)}; shorten it."
            )


def check_range(name: str, value: float | None, demand: str, way_out: str = "change it") -> None:
    """Raises ConfigError unless a number, if any, satisfies a demand: a key of `DEMANDS`."""
    if value is None:
        return
    if not DEMANDS[demand](value):
        raise ConfigError(f"{name} must be {demand}, got {quote(value)}; {way_out}.")
    if isinstance(value, int) and value > MAX_INT:
        raise ConfigError(f"{name} must be at most {MAX_INT}, got {quote(value)}; {way_out}.")


def as_type(hint: Any, value: Any, where: str) -> Any:
    """Converts a value to the annotated type `hint`; `where` names it in errors.

    Raises:
        ConfigError: the value has another type, or is a number beyond float32.
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a NumPy scalar
    if isinstance(value, float) and value and not FLOAT32_MIN <= abs(value) <= FLOAT32_MAX:
        raise ConfigError(
            f"{where} must be 0 or a number from {FLOAT32_MIN:.2g} to {FLOAT32_MAX:.2g} in "
            f"magnitude, the range of float32, got {quote(value)}."
        )
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        # An exact match wins, so that `int | float` keeps 1 and 1.0 apart.
        if type(value) in arguments:
            return value
        for member in arguments:
            # A mapping can only be the dataclass of the union; its own error is more specific.
            if dataclasses.is_dataclass(member) and isinstance(value, Mapping):
                return as_type(member, value, where)
            with contextlib.suppress(ConfigError):
                return as_type(member, value, where)
    elif hint is Any:
        return value
    elif origin is typing.Literal and isinstance(value, (str, int)) and value in arguments:
        return value
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where + ".")
    elif origin in (tuple, list) and isinstance(value, (tuple, list)):
        # A list or a tuple[X, ...] has one element type and any length.
        if origin is list or arguments[-1:] in ((), (...,)):
            arguments = (*arguments, Any)[:1] * len(value)
        if len(arguments) != len(value):
            raise ConfigError(f"{where} must have {len(arguments)} values, got {len(value)}.")
        items = enumerate(zip(arguments, value, strict=True))
        converted = [as_type(member, item, f"{where}[{i}]") for i, (member, item) in items]
        is_same = type(value) is origin and all(map(operator.is_, converted, value))
        return value if is_same else origin(converted)
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        member = (*arguments, Any, Any)[1]
        return {key: as_type(member, item, f"{where}.{key}") for key, item in value.items()}
    elif hint is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    # bool is a subclass of int, but True is never meant as a number.
    elif isinstance(hint, type) and (hint is bool or not isinstance(value, bool)):
        if isinstance(value, hint):
            return value
        if hint is float and isinstance(value, int) and abs(value) <= FLOAT32_MAX:
            return float(value)
    raise ConfigError(f"{where} must be {_spell(hint)}, got {quote(value)}.")


def _spell(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_spell, arguments))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
