"""Frozen dataclasses to and from JSON, compared, named by a fingerprint, loaded from a file."""

import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one sentence that says what to do instead."""


def to_dict(cfg: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values: nested ones as dicts, tuples as lists."""
    return {field.name: _to_json(getattr(cfg, field.name)) for field in dataclasses.fields(cfg)}


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_json(item) for item in value]
    return str(value) if isinstance(value, pathlib.PurePath) else value


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`; fields that are not given keep their defaults.

    Raises:
        ConfigError: a field is unknown or missing, a value has the wrong type, or `cls` refuses it.
    """
    return _build(cls, values, where="")


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__} must be a table of fields, got {values!r}.")
    if hasattr(cls, "upgrade"):  # from the names of earlier versions
        values = cls.upgrade(values)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in values:
        if name not in fields:
            raise ConfigError(_unknown(where + name, name, cls, list(fields)))
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}{name} has no default in {cls.__name__}; give it a value.")
    hints = typing.get_type_hints(cls)
    arguments = {name: _convert(hints[name], value, where + name) for name, value in values.items()}
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _unknown(path: str, name: str, cls: type, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of: {', '.join(known)}."
    return f"{path} is not a field of {cls.__name__}; {hint}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gives it, in the type that `hint` asks for."""
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, where + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal and value in arguments:
        return value
    if (origin or hint) in (tuple, list) and isinstance(value, (tuple, list)):
        return _convert_sequence(origin or hint, arguments, value, where)
    if (origin or hint) is dict and isinstance(value, Mapping):
        item_hint = arguments[1] if arguments else Any
        return {key: _convert(item_hint, item, f"{where}.{key}") for key, item in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    # True is an int to Python, but nobody means it as a count.
    if isinstance(hint, type) and (hint is bool or not isinstance(value, bool)):
        if isinstance(value, hint):
            return value
        if hint is float and isinstance(value, int):
            return float(value)
    raise ConfigError(f"{where} must be {_spell(hint)}, got {value!r}.")


def _convert_union(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(value) in hints:
        return value
    for hint in hints:
        # A table belongs to the dataclass of the union; its own error says more than ours would.
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            return _convert(hint, value, where)
        try:
            return _convert(hint, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where} must be {' or '.join(map(_spell, hints))}, got {value!r}.")


def _convert_sequence(kind: Any, hints: tuple[Any, ...], values: Any, where: str) -> Any:
    if kind is tuple and hints and hints[-1] is not Ellipsis:
        if len(hints) != len(values):
            raise ConfigError(f"{where} must have {len(hints)} values, got {len(values)}.")
    else:
        hints = (hints[0] if hints else Any,) * len(values)
    items = zip(hints, values, strict=True)
    return kind(_convert(hint, value, f"{where}[{i}]") for i, (hint, value) in enumerate(items))


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def fingerprint(cfg: Any) -> str:
    """Twelve hexadecimal digits that name the values of a config; 1 and 1.0 count as equal."""

    def canonical(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: canonical(item) for key, item in value.items()}
        if isinstance(value, list):
            return [canonical(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    text = json.dumps(canonical(to_dict(cfg)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The fields that differ, each as "train.lr: 0.001 here, 0.003 there" (a is here, b there)."""
    here, there = flatten(a), flatten(b)
    absent = object()
    lines = []
    for path in dict.fromkeys((*here, *there)):
        left, right = here.get(path, absent), there.get(path, absent)
        if left != right:
            words = ["absent" if value is absent else repr(value) for value in (left, right)]
            lines.append(f"{path}: {words[0]} here, {words[1]} there")
    return lines


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of dotted names: {"train": {"lr": 1}} becomes {"train.lr": 1}."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def load_config(path: str | pathlib.Path, cls: type[T], size: str | None = None) -> T:
    """The config that a file describes.

    Args:
        path: a Python file with a function `config(size=...)`, a `config.json`, or a run
            directory that holds one.
        cls: the dataclass expected.
        size: handed to `config`; None leaves its own default.

    Raises:
        ConfigError: the file is missing, is not a config, or describes something else than `cls`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; name a CONFIG.py or the folder of a run.")
    if path.suffix == ".json":
        if size is not None:
            raise ConfigError(
                f"size={size!r} cannot be applied to {path}, which has none; leave it out."
            )
        return from_dict(cls, read_json(path))
    if path.suffix != ".py":
        raise ConfigError(
            f"{path} is neither a .py nor a .json file; name a CONFIG.py or a config.json."
        )
    cfg = _call(_config_function(path), path, size)
    if not isinstance(cfg, cls):
        raise ConfigError(
            f"config() of {path} must return {cls.__name__}, got {type(cfg).__name__}."
        )
    return cfg


def read_json(path: pathlib.Path) -> Any:
    """The contents of a JSON file; raises ConfigError if they are no JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is not valid JSON ({error}); restore it or start another run."
        ) from error


def _config_function(path: pathlib.Path) -> Callable[..., Any]:
    name = f"_config_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while they are being defined
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(
            f"{path} line {error.lineno} is not valid Python: {error.msg}."
        ) from error
    function = getattr(module, "config", None)
    if not callable(function):
        raise ConfigError(
            f"{path} has no function config(); define config(size=...) that returns the config."
        )
    return function


def _call(function: Callable[..., Any], path: pathlib.Path, size: str | None) -> Any:
    if size is not None and "size" not in inspect.signature(function).parameters:
        raise ConfigError(f"config() of {path} takes no size, got {size!r}; leave it out.")
    try:
        return function() if size is None else function(size=size)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
