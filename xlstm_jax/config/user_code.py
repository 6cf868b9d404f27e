"""Python files of users: CONFIG.py and the modules of `--import`, whose errors become one line."""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

from xlstm_jax.config.fields import IMPORTS, did_you_mean, type_hints
from xlstm_jax.config.files import user_path
from xlstm_jax.errors import ArgumentError, ConfigError, quote, quote_path

_LIBRARY = pathlib.Path(__file__).parents[1]

imported: dict[str, None] = {}
"""The modules that were imported, as passed to `--import`: an ordered set."""


def call_config(path: pathlib.Path, size: str | None, cls: type, name: str = "config") -> Any:
    """The result of `config(size=...)` of a Python file; errors in it are raised as ConfigError.

    `name` is that of another function to call instead.
    """
    before = set(sys.modules)
    try:
        with _searched_first(path.parent), _errors_of_user_code(path.parent, path, cls):
            function = getattr(_execute(path), name, None)
            if not callable(function):
                raise ConfigError(
                    f"{quote_path(path)} has no function {name}(); define {name}(size=...) that "
                    f"returns the {name}."
                )
            if size is not None and "size" not in inspect.signature(function).parameters:
                raise ConfigError(
                    f"{name}() of {quote_path(path)} takes no size, got {quote(size)}; leave it "
                    "out."
                )
            return function() if size is None else function(size=size)
    finally:
        # Modules beside the file are recorded like those of `--import`: config.json may need them.
        for module in sys.modules.keys() - before:
            file = pathlib.Path(getattr(sys.modules[module], "__file__", None) or "")
            is_beside = file.suffix == ".py" and file.resolve().parent == path.resolve().parent
            if is_beside and "." not in module and not module.startswith("_config_"):
                imported[str(path.with_name(file.name))] = None


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
        if not file.startswith((str(_LIBRARY), "<")):
            outside = f"{quote_path(file)}:{line}"
            if pathlib.Path(file).resolve().parent == folder.resolve():
                inside = f"{quote_path(folder / pathlib.Path(file).name)}:{line}"
    return inside, outside


def _dataclasses_of(cls: Any) -> Iterator[type]:
    """A dataclass and those of its fields, at any depth."""
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        yield cls
        for hint in type_hints(cls).values():
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


def import_module(name: str) -> None:
    """Imports a module by name or by the path of its .py file, and records it.

    Names are looked up in the current directory first. Importing a module registers its block
    kinds, data sets and tokenizers.

    Raises:
        ConfigError: no such module exists.
    """
    if name in imported:
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
    imported[name] = None


def with_imports(values: dict[str, Any]) -> dict[str, Any]:
    """Adds to a config's dict the modules that `import_module` or CONFIG.py files imported."""
    return values | ({IMPORTS: list(imported)} if imported else {})
