"""Frozen dataclasses to and from JSON, compared, named by a fingerprint, loaded from a file.

A field whose metadata have `to_json` (value -> JSON value, left out where it is empty) and
`from_json` ((JSON value, name of the field) -> value) is converted by these.
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

T = TypeVar("T")

IMPORTS = "imports"
"""Key of config.json: the modules that were imported for it. `from_dict` ignores it."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that says what to do instead."""


def to_dict(cfg: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values: nested ones as dicts, tuples as lists."""
    values = {}
    for field in dataclasses.fields(cfg):
        value = field.metadata.get("to_json", _to_json)(getattr(cfg, field.name))
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
    """The inverse of `to_dict`; fields that are not given keep their defaults.

    `where` stands before their names in errors.

    Raises:
        ConfigError: a field is unknown or missing, a value has the wrong type, or `cls` refuses it.
    """
    kind: Any = cls
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where.rstrip('.') or cls.__name__} must be a table of fields, got {values!r}."
        )
    values = {name: value for name, value in values.items() if where or name != IMPORTS}
    if hasattr(kind, "upgrade"):  # from the names of earlier versions
        values = kind.upgrade(values)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for name in values:
        if name not in fields:
            hint = did_you_mean(name, fields, f"use one of: {', '.join(fields)}.")
            raise ConfigError(f"{where}{name} is not a field of {cls.__name__}; {hint}")
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


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about an unknown name: the known ones it resembles, else `otherwise`."""
    # Of a dotted name the last part is what people remember: lr for train.lr.
    near = [other for other in known if other.endswith("." + name.lstrip("-"))]
    near = near or difflib.get_close_matches(name, known)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gives it, in the type that `hint` asks for."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(value) in arguments:
            return value
        for member in arguments:
            # A table belongs to the dataclass of the union; its own error says more than ours.
            if dataclasses.is_dataclass(member) and isinstance(value, Mapping):
                return _convert(member, value, where)
            with contextlib.suppress(ConfigError):
                return _convert(member, value, where)
    elif hint is Any or (origin is typing.Literal and value in arguments):
        return value
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where + ".")
    elif origin in (tuple, list) and isinstance(value, (tuple, list)):
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
    # True is an int to Python, but nobody means it as a count.
    elif isinstance(hint, type) and (hint is bool or not isinstance(value, bool)):
        if isinstance(value, hint):
            return value
        if hint is float and isinstance(value, int):
            return float(value)
    raise ConfigError(f"{where} must be {_spell(hint)}, got {value!r}.")


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
    """Twelve hexadecimal digits that name the values of a config; 1 and 1.0 count as equal."""

    def number(text: str) -> float:
        return int(float(text)) if float(text).is_integer() else float(text)

    values = json.loads(json.dumps(to_dict(cfg)), parse_float=number)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The fields that differ, each as "train.lr: 0.001 here, 0.003 there" (a is here, b there)."""
    here, there = flatten(a), flatten(b)
    lines = []
    for path in dict.fromkeys((*here, *there)):
        if path not in here or path not in there or here[path] != there[path]:
            left, right = (repr(x[path]) if path in x else "absent" for x in (here, there))
            lines.append(f"{path}: {left} here, {right} there")
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
        path: a Python file with a function `config(size=...)`, whose folder is the first on
            `sys.path` while it runs, a `config.json`, or the run directory of one.
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
    if path.suffix not in (".py", ".json"):
        raise ConfigError(
            f"{path} is neither a .py nor a .json file; name a CONFIG.py or a config.json."
        )
    if path.suffix == ".py":
        cfg = _from_python_file(path, size)
        if not isinstance(cfg, cls):
            raise ConfigError(
                f"config() of {path} must return {cls.__name__}, got {type(cfg).__name__}."
            )
        return cfg
    if size is not None:
        raise ConfigError(
            f"size={size!r} cannot be applied to {path}, which has none; leave it out."
        )
    values = read_json(path)
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        names = values.get(IMPORTS, ()) if isinstance(values, Mapping) else ()
        flags = " ".join(f"--import {name}" for name in names if name not in _imported)
        if not flags:
            raise
        raise ConfigError(f"{path} needs {flags}, as it was written with it: {error}") from error


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
        # What it imports from its folder, `--import` would import too.
        for name in sys.modules.keys() - before:
            file = pathlib.Path(getattr(sys.modules[name], "__file__", None) or "")
            is_beside = file.suffix == ".py" and file.resolve().parent == path.resolve().parent
            if is_beside and "." not in name and not name.startswith("_config_"):
                _imported[str(path.with_name(file.name))] = None


def _execute(path: pathlib.Path) -> types.ModuleType:
    """The module of a file, under a name that no other file has."""
    name = "_config_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
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
    return module


@contextlib.contextmanager
def _searched_first(folder: pathlib.Path) -> Iterator[None]:
    """Imports search this folder first."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def read_json(path: pathlib.Path) -> Any:
    """The contents of a JSON file; raises ConfigError if it is not valid JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is not valid JSON ({error}); restore it or fetch it again."
        ) from error


_imported: dict[str, None] = {}  # by their names, in order


def import_module(name: str) -> None:
    """Imports a module by its name or by the path of its .py file, and records it.

    A name is searched in the current directory first. A module registers what it adds: block
    kinds, data sets, tokenizers.

    Raises:
        ConfigError: there is no such module.
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
            raise  # an import inside the module
        raise ConfigError(
            f"--import {name} must name a module of this directory or an installed one, or a .py "
            "file; correct it."
        ) from error
    _imported[name] = None


def with_imports(values: dict[str, Any]) -> dict[str, Any]:
    """A config's dict with the modules that `import_module` or CONFIG.py files imported, if any."""
    return values | ({IMPORTS: list(_imported)} if _imported else {})
