"""Tokenizers: text to token ids and back."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from xlstm_jax.errors import ConfigError, quote


@runtime_checkable  # so that signatures can be checked at run time
class Tokenizer(Protocol):
    """The interface of a tokenizer; an entry of `TOKENIZERS`."""

    @property
    def name(self) -> str:
        """The key in `TOKENIZERS`, recorded in descriptions of data."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, `eos_id` included."""

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""

    def encode(self, text: str | bytes) -> Integer[np.ndarray, "T"]:
        """Token ids of a text, without `eos_id` at the end."""

    def decode(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> str:
        """The text of token ids; `eos_id` has none."""

    def num_bytes(self, ids: Integer[np.ndarray, "*T"] | Sequence[int]) -> int:
        """Bytes of text that the ids encode: the divisor of bits per byte."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One id per byte of UTF-8 text, and id 256 for the end of a document."""

    name: str = "byte"
    vocab_size: int = 257
    eos_id: int = 256

    def encode(self, text: str | bytes) -> Integer[np.ndarray, "T"]:
        """The bytes of a text as ids, without `eos_id` at the end.

        Bytes need not be valid UTF-8. A string that Python decoded with "surrogateescape", as it
        does with command-line arguments, is encoded to its original bytes.
        """
        if isinstance(text, str):
            text = text.encode("utf-8", errors="surrogateescape")
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> bytes:
        """The exact bytes of token ids; `eos_id` has none. Raises ConfigError for an unknown id."""
        ids = np.asarray(ids, np.int64)  # a narrower type could wrap an invalid id into the range
        invalid = ids[(ids < 0) | (ids >= self.vocab_size)]
        if invalid.size:
            raise ConfigError(
                f"ids must be in 0..{self.vocab_size - 1} for tokenizer={self.name!r}, "
                f"got {invalid[0]}; decode with the tokenizer that encoded them."
            )
        return ids[ids != self.eos_id].astype(np.uint8).tobytes()

    def decode(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> str:
        """The text of token ids; invalid UTF-8 becomes U+FFFD. Raises like `decode_bytes`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def num_bytes(self, ids: Integer[np.ndarray, "*T"] | Sequence[int]) -> int:
        """Bytes of text that the ids encode; `eos_id` has none."""
        return int(np.count_nonzero(np.asarray(ids) != self.eos_id))


TOKENIZERS: dict[str, Tokenizer] = {"byte": ByteTokenizer()}


def get(name: str) -> Tokenizer:
    """The tokenizer with this name; raises ConfigError, with the known names, if there is none."""
    if name not in TOKENIZERS:
        known = ", ".join(repr(known) for known in TOKENIZERS)
        raise ConfigError(f"tokenizer={quote(name)} is not known; use one of: {known}.")
    return TOKENIZERS[name]
