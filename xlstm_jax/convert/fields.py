"""Validation of configs of other implementations, field by field.

A field is used, known to have no effect, rejected, or logged as unknown; none is ignored silently.
"""

import itertools
import logging
import numbers
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from xlstm_jax.config.files import read_json
from xlstm_jax.errors import ConfigError, quote, quote_path

CONFIG = "config.json"

MAX_BYTES = 10**6
"""Size of a config file; published ones have a few thousand bytes."""

MAX_COUNT = 2**31 - 1
"""The largest count; JAX indexes with 32 bits."""

DTYPES = ("float32", "bfloat16")

_LARGEST = 3.4e38  # of float32, in which models compute
_MISSING = object()


def check_size(path: Path, limit: int = MAX_BYTES) -> None:
    """Raises ConfigError if a file is longer than `limit`: parsed, it takes far more memory."""
    size = path.stat().st_size
    if size > limit:
        raise ConfigError(
            f"{quote_path(path)} must have at most {limit:,} bytes, got {size:,}; fetch it again."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a folder; raises ConfigError if it is not a JSON object."""
    path = folder / CONFIG
    check_size(path)
    values = read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(
            f"{quote_path(path)} must be a JSON object, got {quote(values)}; download it again."
        )
    return values


def check_dtype(dtype: str) -> None:
    """Raises ConfigError unless activations can have this dtype."""
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype={quote(dtype)} must be one of {', '.join(DTYPES)}, as float16 overflows; "
            "load it with dtype='bfloat16' or dtype='float32'."
        )


class Fields:
    """The fields of a config of another implementation; errors call the config `where`.

    `largest` bounds the sizes of arrays: that of the weights, so that a senseless config is
    rejected before anything of its sizes is built.

    It records which fields have been read. Every method that reads a field raises ConfigError if
    its value is invalid.
    """

    def __init__(self, values: Mapping[str, Any], where: str, largest: int = MAX_COUNT):
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{where} must be a mapping of fields, got {quote(values)}; pass a dict."
            )
        for name in values:
            if not isinstance(name, str):
                raise ConfigError(
                    f"{where} must have strings as keys, got {quote(name)}; quote it."
                )
        self._values, self.where, self._largest = values, where, largest
        self._seen: set[str] = set()

    def __contains__(self, name: str) -> bool:
        # None counts as absent: configs written as JSON have null for unset fields.
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether the field is present and null, which is not the same as absent."""
        return name in self._values and self._values[name] is None

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a field, or `default`, that of the other implementation."""
        self._seen.add(name)
        value = self._values.get(name, default)
        if value is _MISSING:
            raise ConfigError(f"{self.where} must have the field {name!r}; add it.")
        return value

    def value(self, name: str, default: Any) -> Any:
        """The value of a field, or `default` if it is absent or null."""
        value = self.get(name, None)
        return default if value is None else value

    def number(self, name: str, default: Any = _MISSING, *, minimum: float | None = None) -> Any:
        """A finite number, at least `minimum`."""
        value = self.get(name, default)
        # bool is a subclass of int, but true is not a number in JSON or YAML.
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        fits = is_number and _is_float32(value)
        self.require(name, value, "a finite number", fits=fits)
        fits = minimum is None or float(value) >= minimum
        self.require(name, value, f"at least {minimum}", fits=fits)
        return value

    def positive(self, name: str, default: Any = _MISSING) -> float:
        """A finite number above 0."""
        value = self.number(name, default)
        self.require(name, value, "above 0", fits=value > 0)
        return float(value)

    def count(self, name: str, default: Any = _MISSING, *, minimum: int = 1) -> int:
        """An integer of at least `minimum`; 4.0 is accepted for 4."""
        value = self.number(name, default)
        is_count = value == int(value) and value >= minimum
        self.require(name, value, f"an integer of at least {minimum}", fits=is_count)
        self.require(name, value, f"at most {MAX_COUNT}", fits=value <= MAX_COUNT)
        return int(value)

    def size(self, name: str, default: Any = _MISSING, *, minimum: int = 1) -> int:
        """A count that is the size of an array."""
        value = self.count(name, default, minimum=minimum)
        self.require_size(name, value)
        return value

    def size_or(self, name: str, default: int) -> int:
        """A size, or `default` if it is absent or null."""
        return default if self.get(name, None) is None else self.size(name)

    def require_size(self, name: str, size: float) -> None:
        """Raises ConfigError if an array of the weights cannot have this size."""
        what = f"at most {self._largest}, the largest size in the weights"
        self.require(name, size, what, fits=size <= self._largest)

    def flag(self, name: str, *, default: Any = _MISSING) -> bool:
        """A boolean."""
        value = self.get(name, default)
        self.require(name, value, "true or false", fits=isinstance(value, bool))
        return value

    def nested(self, name: str) -> "Fields | None":
        """The fields of a nested mapping; None if it is absent or null."""
        value = self.get(name, None)
        return None if value is None else Fields(value, f"{name} of {self.where}", self._largest)

    def require_equal(self, name: str, expected: Any, way_out: str) -> None:
        """Rejects any value but `expected`, which is also the default."""
        value = self.get(name, expected)
        self.require(name, value, quote(expected), way_out, fits=value == expected)

    def require(
        self, name: str, value: Any, what: str, way_out: str = "correct it", *, fits: bool
    ) -> None:
        """Raises ConfigError unless `fits`; the message has the demand `what` and the `way_out`."""
        if not fits:
            where = f"{name} of {self.where}"
            raise ConfigError(f"{where} must be {what}, got {quote(value)}; {way_out}.")

    def ignore(self, *names: str) -> None:
        """Marks fields as known that do not affect results, such as the choice of a kernel."""
        self._seen.update(names)

    def warn_unknown(self) -> None:
        """Logs the fields that were neither read nor marked."""
        unknown = sorted(set(self._values) - self._seen)
        if unknown:
            logging.getLogger(__name__).warning(
                "unknown fields of %s are ignored: %s", self.where, first_of(unknown, 8)
            )


def _is_float32(value: Any) -> bool:
    # Compared, not converted: an integer may exceed every float. NaN fails, too.
    return bool(abs(value) <= _LARGEST)


def first_of(items: Collection[str], count: int) -> str:
    """The first items for a message, without quotation marks, and the number of others."""
    words = [quote(item)[1:-1] for item in itertools.islice(items, count)]
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(words) + more
