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
import operator
import os
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from xlstm_jax.errors import ArgumentError, quote, quote_path
from xlstm_jax.errors import ConfigError as ConfigError  # public under this name

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
            hint = did_you_mean(str(name), fields)
            raise ConfigError(
                f"{quote_path(f'{where}{name}')} is not a field of {cls.__name__}; {hint}"
            )
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}{name} has no default in {cls.__name__}; give it a value.")
    hints = _type_hints(cls)
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


_type_hints = functools.cache(typing.get_type_hints)

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
        converted = as_type(_type_hints(type(cfg))[field.name], value, where + field.name)
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
            left, right = (quote(x[path]) if path in x else "absent" for x in (new, stored))
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
        cfg = _from_python_file(path, size, cls)
        if not isinstance(cfg, cls):
            raise ConfigError(
                f"config() of {shown} must return {cls.__name__}, got {type(cfg).__name__}."
            )
        return cfg
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
        flags = " ".join(f"--import {quote_path(x)}" for x in map(str, names) if x not in _imported)
        if not flags:
            raise ConfigError(f"{shown}: {error}") from error
        raise ConfigError(f"{shown} needs {flags}, which it was written with: {error}") from error


def user_path(path: str | pathlib.Path) -> pathlib.Path:
    """The path with a leading "~" or "~user" replaced; ConfigError if there is no such home."""
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


def _from_python_file(path: pathlib.Path, size: str | None, cls: type) -> Any:
    before = set(sys.modules)
    try:
        with _searched_first(path.parent), _errors_of_user_code(path.parent, path, cls):
            function = getattr(_execute(path), "config", None)
            if not callable(function):
                raise ConfigError(
                    f"{quote_path(path)} has no function config(); define config(size=...) that "
                    "returns the config."
                )
            if size is not None and "size" not in inspect.signature(function).parameters:
                raise ConfigError(
                    f"config() of {quote_path(path)} takes no size, got {quote(size)}; leave it "
                    "out."
                )
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
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _errors_of_user_code(
    folder: pathlib.Path, file: pathlib.Path | None = None, cls: type | None = None
) -> Iterator[None]:
    """Within the context, errors become one line with their location in a file of the user.

    Args:
        folder: of the user's files; the location is the last line of the traceback in one of them.
        file: location of errors outside of them; None: any last line outside of this library.
        cls: the config class; misspelled fields of it and of its fields get a hint.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        inside, outside = _locations(error, folder)
        if isinstance(error, ArgumentError) and not inside:
            raise  # of this library, not of the user's code
        location = inside or (outside if file is None else quote_path(file))
        raise ConfigError(f"{location}: {_reason(error, cls)}") from error


MAX_REASON = 1000
"""Characters of the message of an error in a user's file that are shown."""


def _reason(error: BaseException, cls: type | None) -> str:
    """Type and message of an error, with a hint if it is about a misspelled field of `cls`."""
    reason = error.msg if isinstance(error, SyntaxError) else str(error)
    if isinstance(error, ArgumentError):  # those of this library need no type
        return reason
    unknown = re.match(r"(\S+)\.__init__\(\) got an unexpected .*?'(\w+)'", reason)
    for other in _dataclasses_of(cls) if unknown else ():
        if unknown and other.__qualname__ == unknown[1]:
            fields = [field.name for field in dataclasses.fields(other)]
            reason = f"{unknown[0]}; {did_you_mean(unknown[2], fields)}"
    name = type(error).__name__
    return f"{name}: {reason[:MAX_REASON]}" if reason else name


def _locations(error: BaseException, folder: pathlib.Path) -> tuple[str, str]:
    """FILE:LINE of the last line in a folder, and of the last line outside of this library."""
    lines = [(frame.f_code.co_filename, n) for frame, n in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((error.filename, error.lineno or 1))
    inside = outside = ""
    for file, line in lines:
        # "<string>": the __init__ of a dataclass.
        if not file.startswith((str(pathlib.Path(__file__).parent), "<")):
            outside = f"{quote_path(file)}:{line}"
            if pathlib.Path(file).resolve().parent == folder.resolve():
                inside = f"{quote_path(folder / pathlib.Path(file).name)}:{line}"
    return inside, outside


def _dataclasses_of(cls: Any) -> Iterator[type]:
    """A dataclass and those of its fields, at any depth."""
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        yield cls
        for hint in _type_hints(cls).values():
            yield from _dataclasses_of(hint)


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
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes, path: str | pathlib.Path) -> Any:
    """The value of JSON in UTF-8, read from `path`; raises ConfigError if it is not valid."""
    try:
        return json.loads(data.decode())
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
    path, module = user_path(name), name.lstrip(".")
    is_file = path.suffix == ".py" and path.is_file()
    folder = path.parent if is_file else pathlib.Path()
    missing = ConfigError(
        f"--import {quote_path(name)} must name a .py file or a module that is installed or in "
        "this directory; correct it or XLSTM_IMPORT."
    )
    if not module or "\0" in module:
        raise missing
    with _searched_first(folder), _errors_of_user_code(folder):
        try:
            _execute(path) if is_file else importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in (module, module.split(".")[0]):
                raise  # the module exists, but one of its own imports does not
            raise missing from None
    _imported[name] = None


def with_imports(values: dict[str, Any]) -> dict[str, Any]:
    """Adds to a config's dict the modules that `import_module` or CONFIG.py files imported."""
    return values | ({IMPORTS: list(_imported)} if _imported else {})
