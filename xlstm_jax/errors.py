"""Errors that a user can act on, and the quoting of values in their messages.

Commands recognize these errors by type and print them as one line; any other exception is a bug of
this library and keeps its traceback.
"""

import importlib
import reprlib
from os import PathLike
from typing import Any

MAX_QUOTED = 80
"""Characters of a value that a message quotes; a file may hold a value of any size."""


class ArgumentError(ValueError):
    """An invalid argument of a function. The message is one line that includes a remedy."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class ConfigError(ArgumentError):
    """An invalid setting, file or command line. The message is one line that includes a remedy."""


class UnsupportedError(NotImplementedError):
    """A valid combination of arguments that has no implementation here; the message says why."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class NetworkError(ConnectionError):
    """A server cannot be reached, or fails. The message is one line that includes a remedy."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def import_optional(module: str, purpose: str, *, install: str, package: str = "") -> Any:
    """Imports a module of an optional package, which `package` names if the module does not.

    Args:
        purpose: what needs it, the subject of the message.
        install: what `pip install` installs, such as "xlstm-jax[data]".

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs the package {package or module.split('.')[0]}, which is not "
            f"installed; `pip install '{install}'`."
        ) from error


def printable(text: str) -> str:
    """The text on one line, with escape sequences for control characters."""
    text = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quote(value: object) -> str:
    """The `repr` of a value for a message: printable, truncated to about `MAX_QUOTED` characters.

    Of nested values only the beginning is visited, so that the cost is bounded as well.
    """
    return shorten(_repr.repr(value))


def quote_path(path: str | PathLike[str]) -> str:
    """A path for a message; names, and paths, that no file system allows are truncated."""
    return printable(shorten("/".join(shorten(name) for name in str(path).split("/")), 400))


def shorten(text: str, limit: int = MAX_QUOTED) -> str:
    """The text, or its beginning and end if it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


class _BoundedRepr(reprlib.Repr):
    """`reprlib.Repr` within `MAX_QUOTED`, also for integers that Python refuses to print."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = MAX_QUOTED
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        # Python limits the digits of a conversion to text, because their cost is quadratic.
        if x.bit_length() > 1000:
            return f"an integer of {x.bit_length()} bits"
        return super().repr_int(x, level)


_repr = _BoundedRepr()
