"""Serialization, comparison, fingerprints and loading of frozen config dataclasses.

A field may override its conversion in its metadata: `to_json` maps a value to a JSON value, which
is omitted when empty, and `from_json` maps (JSON value, field name) back to the value.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import pathlib
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from xlstm_jax.errors import ConfigError as ConfigError  # public under this name
from xlstm_jax.errors import quote, quote_path

T = TypeVar("T")

IMPORTS = "imports"
"""Key of config.json that lists the modules its config needs. `from_dict` ignores it."""


def to_dict(cfg: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values: dataclasses become dicts, tuples become lists."""
    values = {}
    for field in dataclasses.fields(cfg):
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
            hint = did_you_mean(name, fields)
            raise ConfigError(
                f"{quote_path(where + name)} is not a field of {cls.__name__}; {hint}"
            )
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}{name} has no default in {cls.__name__}; give it a value.")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        convert = fields[name].metadata.get("from_json", functools.partial(_convert, hints[name]))
        arguments[name] = convert(value, where + name)
    with _value_errors_as_config_errors():
        return cls(**arguments)


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """A hint for an error about an unknown name: similar ones, else `otherwise`, else all known."""
    # Users remember the last part of a dotted name: lr for train.lr.
    near = [other for other in known if other.endswith("." + name.lstrip("-"))]
    near = near or difflib.get_close_matches(name, known)
    otherwise = otherwise or f"use one of: {', '.join(known)}."
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Converts a JSON value to the annotated type `hint`; `where` names it in errors."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        # An exact match wins, so that `int | float` keeps 1 and 1.0 apart.
        if type(value) in arguments:
            return value
        for member in arguments:
            # A mapping can only be the dataclass of the union; its own error is more specific.
            if dataclasses.is_dataclass(member) and isinstance(value, Mapping):
                return _convert(member, value, where)
            with contextlib.suppress(ConfigError):
                return _convert(member, value, where)
    elif hint is Any or (origin is typing.Literal and value in arguments):
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
        return origin(_convert(member, item, f"{where}[{i}]") for i, (member, item) in items)
    elif origin is dict and isinstance(value, Mapping):
        member = (*arguments, Any, Any)[1]
        return {key: _convert(member, item, f"{where}.{key}") for key, item in value.items()}
    elif hint is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    # bool is a subclass of int, but True is never meant as a number.
    elif isinstance(hint, type) and (hint is bool or not isinstance(value, bool)):
        if isinstance(value, hint):
            return value
        if hint is float and isinstance(value, int):
            return float(value)
    raise ConfigError(f"{where} must be {_spell(hint)}, got {quote(value)}.")


def _spell(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_spell, arguments))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


@contextlib.contextmanager
def _value_errors_as_config_errors() -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def fingerprint(cfg: Any) -> str:
    """A hash of the values of a config: twelve hexadecimal digits; 1 and 1.0 are equal."""

    # A float field may hold an int, which JSON writes without ".0".
    def number(text: str) -> float:
        return int(float(text)) if float(text).is_integer() else float(text)

    values = json.loads(json.dumps(to_dict(cfg)), parse_float=number)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(new: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """The fields that differ from those of an earlier run: "train.lr: 0.001, stored 0.003"."""
    new, stored = flatten(new), flatten(stored)
    lines = []
    # Keys are compared, not only values: None and an absent field are different.
    for path in dict.fromkeys((*new, *stored)):
        if path not in new or path not in stored or new[path] != stored[path]:
            left, right = (repr(x[path]) if path in x else "absent" for x in (new, stored))
            lines.append(f"{path}: {left}, stored {right}")
    return lines


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted names: {"train": {"lr": 1}} becomes {"train.lr": 1}."""
    flat = {}
    for name, value in values.items():
        # An empty mapping stays a value, otherwise it would vanish from comparisons.
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def load_config(path: str | pathlib.Path, cls: type[T], size: str | None = None) -> T:
    """Loads a config from a file.

    Args:
        path: a Python file that defines `config(size=...)`, a `config.json`, or a run directory.
            The folder of a Python file is first on `sys.path` while it runs.
        size: argument of `config`; None uses its default.

    Raises:
        ConfigError: the file is missing, is not a config, or describes something other than `cls`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; pass a CONFIG.py or a run directory.")
    if path.suffix not in (".py", ".json"):
        raise ConfigError(
            f"{path} is neither a .py nor a .json file; pass a CONFIG.py or a config.json."
        )
    if path.suffix == ".py":
        cfg = _from_python_file(path, size)
        if not isinstance(cfg, cls):
            raise ConfigError(
                f"config() of {path} must return {cls.__name__}, got {type(cfg).__name__}."
            )
        return cfg
    if size is not None:
        raise ConfigError(f"size={size!r} applies to a CONFIG.py only, got {path}; leave it out.")
    values = read_json(path)
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        # The recorded modules are never imported from here: a file must not run code.
        names = values.get(IMPORTS, ()) if isinstance(values, Mapping) else ()
        flags = " ".join(f"--import {name}" for name in names if name not in _imported)
        if not flags:
            raise
        raise ConfigError(f"{path} needs {flags}, which it was written with: {error}") from error


def _from_python_file(path: pathlib.Path, size: str | None) -> Any:
    before = set(sys.modules)
    try:
        with _searched_first(path.parent):
            function = getattr(_execute(path), "config", None)
            if not callable(function):
                raise ConfigError(
                    f"{path} has no function config(); define config(size=...) that returns the "
                    "config."
                )
            if size is not None and "size" not in inspect.signature(function).parameters:
                raise ConfigError(f"config() of {path} takes no size, got {size!r}; leave it out.")
            with _value_errors_as_config_errors():
                return function() if size is None else function(size=size)
    finally:
        # Modules beside the file are recorded like those of `--import`: config.json may need them.
        for name in sys.modules.keys() - before:
            file = pathlib.Path(getattr(sys.modules[name], "__file__", None) or "")
            is_beside = file.suffix == ".py" and file.resolve().parent == path.resolve().parent
            if is_beside and "." not in name and not name.startswith("_config_"):
                _imported[str(path.with_name(file.name))] = None


def _execute(path: pathlib.Path) -> types.ModuleType:
    """Executes a file as a module whose name is unique to its path."""
    name = "_config_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # `dataclass` looks up the module while it defines a class
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(
            f"{path} line {error.lineno} is not valid Python: {error.msg}; correct it."
        ) from error
    return module


@contextlib.contextmanager
def _searched_first(folder: pathlib.Path) -> Iterator[None]:
    """Within the context, imports search this folder first."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the file may have edited sys.path itself
            sys.path.remove(entry)


def read_json(path: pathlib.Path) -> Any:
    """The contents of a JSON file; raises ConfigError if it is not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        message = f"{quote_path(path)} is not valid JSON ({reason}); restore it or fetch it again."
        raise ConfigError(message) from error


_imported: dict[str, None] = {}  # an ordered set of names, as passed to `--import`


def import_module(name: str) -> None:
    """Imports a module by name or by the path of its .py file, and records it.

    Names are looked up in the current directory first. Importing a module registers its block
    kinds, data sets and tokenizers.

    Raises:
        ConfigError: no such module exists.
    """
    if name in _imported:
        return
    path, module = pathlib.Path(name), name.lstrip(".")
    is_file = path.suffix == ".py" and path.is_file()
    try:
        with _searched_first(path.parent if is_file else pathlib.Path()):
            _execute(path) if is_file else importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.split(".")[0]):
            raise  # the module exists, but one of its own imports does not
        raise ConfigError(
            f"--import {name} must name a .py file or a module that is installed or in this "
            "directory; correct it."
        ) from error
    _imported[name] = None


def with_imports(values: dict[str, Any]) -> dict[str, Any]:
    """Adds to a config's dict the modules that `import_module` or CONFIG.py files imported."""
    return values | ({IMPORTS: list(_imported)} if _imported else {})
