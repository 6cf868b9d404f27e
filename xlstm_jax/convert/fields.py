"""Configs of other implementations, field by field: each is used, known to have no effect, refused,
or logged as unknown; none is ignored silently.
"""

import logging
import math
import numbers
from collections.abc import Mapping
from typing import Any

from xlstm_jax.config import ConfigError

_MISSING = object()


class Fields:
    """The fields of a config of another implementation, named `where` in errors.

    It remembers which have been read. Every method raises ConfigError where a field does not hold
    what it must.
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
        """A finite number, of at least `least`."""
        value = self.get(name, default)
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        self.demand(name, value, "a finite number", fits=is_number and math.isfinite(value))
        self.demand(name, value, f"at least {least}", fits=least is None or float(value) >= least)
        return value

    def positive(self, name: str, default: Any = _MISSING) -> float:
        """A number above 0."""
        value = self.number(name, default)
        self.demand(name, value, "above 0", fits=value > 0)
        return float(value)

    def count(self, name: str, default: Any = _MISSING, *, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.number(name, default)
        is_count = value == int(value) and value >= least
        self.demand(name, value, f"a whole number of at least {least}", fits=is_count)
        return int(value)

    def flag(self, name: str, *, default: Any = _MISSING) -> bool:
        """True or false."""
        value = self.get(name, default)
        self.demand(name, value, "true or false", fits=isinstance(value, bool))
        return value

    def table(self, name: str) -> "Fields | None":
        """A table inside; None where it is absent or null."""
        value = self.get(name, None)
        return None if value is None else Fields(value, f"{name} of {self._where}")

    def refuse_unless(self, name: str, wanted: Any, instead: str) -> None:
        """Nothing but `wanted`, the default; `instead` is the way out."""
        value = self.get(name, wanted)
        self.demand(name, value, f"{wanted!r} here", instead, fits=value == wanted)

    def demand(
        self, name: str, value: Any, what: str, way_out: str = "correct it", *, fits: bool
    ) -> None:
        """Refuses the value of a field unless it fits; says what it must be."""
        if not fits:
            where = f"{name} of {self._where}"
            raise ConfigError(f"{where} must be {what}, got {value!r}; {way_out}.")

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
