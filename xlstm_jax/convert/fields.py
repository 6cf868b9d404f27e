"""Configs of other implementations, field by field: each is used, known to have no effect, refused,
or logged as unknown; none is ignored silently.
"""

import logging
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from xlstm_jax.config import ConfigError

_MISSING = object()


class Fields:
    """The fields of a config of another implementation; remembers which have been read.

    Every method raises ConfigError where a field does not hold what it must.

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
        """The value of a field, or the default of the other implementation if there is one."""
        self._seen.add(name)
        value = self._values.get(name, default)
        if value is _MISSING:
            raise ConfigError(f"{self._where} must have the field {name!r}; add it.")
        return value

    def number(self, name: str, default: Any = _MISSING, *, least: float | None = None) -> Any:
        """A field that must hold a finite number, of at least `least`."""
        value = self.get(name, default)
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            self._refuse(name, "a finite number", value)
        if least is not None and value < least:
            self._refuse(name, f"at least {least}", value)
        return value

    def positive(self, name: str, default: Any = _MISSING) -> float:
        """A field that must hold a number above 0."""
        value = self.number(name, default)
        if value <= 0:
            self._refuse(name, "above 0", value)
        return float(value)

    def count(self, name: str, default: Any = _MISSING, *, least: int = 1) -> int:
        """A field that must hold a whole number of at least `least`."""
        value = self.number(name, default)
        if value != int(value) or value < least:
            self._refuse(name, f"a whole number of at least {least}", value)
        return int(value)

    def choice(self, name: str, default: str, choices: Iterable[str], nearest: str) -> str:
        """A field that must hold one of these words."""
        value, choices = self.get(name, default), tuple(choices)
        if value not in choices:
            self._refuse(name, f"one of {', '.join(choices)}", value, f"the nearest is {nearest}")
        return value

    def flag(self, name: str, *, default: Any = _MISSING) -> bool:
        """A field that must be true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self._refuse(name, "true or false", value)
        return value

    def table(self, name: str) -> "Fields | None":
        """A table inside; None where it is absent or null."""
        value = self.get(name, None)
        return None if value is None else Fields(value, f"{name} of {self._where}")

    def refuse_unless(self, name: str, default: Any, wanted: Any, instead: str) -> None:
        """A field that may have one value only; `instead` is the way out where it has another."""
        value = self.get(name, default)
        if value != wanted:
            self._refuse(name, f"{wanted!r} here", value, instead)

    def _refuse(self, name: str, demand: str, value: Any, way_out: str = "correct it") -> NoReturn:
        raise ConfigError(f"{name} of {self._where} must be {demand}, got {value!r}; {way_out}.")

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
