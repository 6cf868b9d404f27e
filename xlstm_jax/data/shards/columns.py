"""Flat arrays of integers in files, read by position."""

import dataclasses
import functools
import os
from typing import Any

import numpy as np
from jaxtyping import Integer

from xlstm_jax.errors import ConfigError, quote_path


@dataclasses.dataclass(frozen=True)
class Column:
    """`length` little-endian integers in a file, from a byte offset on; the file is mapped."""

    path: str
    dtype: str  # of NumPy: "<u2"
    length: int
    offset: int = 0  # bytes

    def __getstate__(self) -> dict[str, Any]:
        # Without the mapped file: another process maps it again.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def array(self) -> Integer[np.ndarray, "N"]:
        """The mapped file.

        Raises:
            ConfigError: the file is shorter than the column.
        """
        dtype = np.dtype(self.dtype)
        needed = self.offset + self.length * dtype.itemsize
        if (size := os.path.getsize(self.path)) < needed:
            raise ConfigError(
                f"{quote_path(self.path)} must have at least {needed:,} bytes, got {size:,}; "
                "copy the file again, or prepare the data again."
            )
        if self.length == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        # As a plain array, whose parts are read in half the time.
        return np.memmap(self.path, dtype, "r", self.offset, (self.length,)).view(np.ndarray)

    def read(self, start: int, stop: int) -> Integer[np.ndarray, "N"]:
        """A copy of the elements start..stop - 1, which must exist."""
        return np.array(self.array[start:stop])
