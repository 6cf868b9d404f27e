"""Configs of other implementations, field by field: each is used, known to be without effect,
refused, or said to be unknown; none is passed over in silence."""

import logging
from collections.abc import Mapping
from typing import Any

from xlstm_jax.config import ConfigError

_MISSING = object()


class Fields:
    """The fields of a config of another implementation, with a list of what has been asked for.

    Args:
        values: the config.
        where: its name in errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} must be a table of fields, got {values!r}.")
        self._values, self._where, self._seen = values, where, set()

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether the field is there without a value, which is not the same as its default."""
        return name in self._values and self._values[name] is None

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a field, or the default of the other implementation.

        Raises:
            ConfigError: it is not there and has no default, or has another type than the default.
        """
        self._seen.add(name)
        value = self._values.get(name, default)
        if value is _MISSING:
            raise ConfigError(f"{self._where} must have the field {name!r}; add it.")
        return value

    def number(self, name: str, default: Any = _MISSING) -> Any:
        """A field that must hold a number.

        Raises:
            ConfigError: it does not.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(
                f"{name} of {self._where} must be a number, got {value!r}; correct it."
            )
        return value

    def count(self, name: str, default: Any = _MISSING) -> int:
        """A field that must hold a whole number above 0.

        Raises:
            ConfigError: it does not.
        """
        value = self.number(name, default)
        if value != int(value) or value < 1:
            raise ConfigError(
                f"{name} of {self._where} must be a whole number above 0, got {value!r}; "
                "correct it."
            )
        return int(value)

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        """A field that must be true or false.

        Raises:
            ConfigError: it is neither.
        """
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(
                f"{name} of {self._where} must be true or false, got {value!r}; correct it."
            )
        return value

    def table(self, name: str) -> "Fields | None":
        """A table inside; None where it is absent or null."""
        value = self.get(name, None)
        return None if value is None else Fields(value, f"{name} of {self._where}")

    def refuse_unless(self, name: str, default: Any, wanted: Any, instead: str) -> None:
        """A field that may have one value only.

        Raises:
            ConfigError: it has another; `instead` says what comes nearest.
        """
        value = self.get(name, default)
        if value != wanted:
            raise ConfigError(
                f"{name} of {self._where} must be {wanted!r} here, got {value!r}; {instead}."
            )

    def ignore(self, *names: str) -> None:
        """Fields that change no number: which kernel runs, what memory it takes, who wrote it."""
        self._seen.update(names)

    def done(self) -> None:
        """Logs the fields that nothing has asked for."""
        unknown = sorted(set(self._values) - self._seen)
        if unknown:
            logging.getLogger(__name__).warning(
                "unknown fields of %s are ignored: %s", self._where, ", ".join(unknown)
            )
