"""The interface of a tokenizer, what all tokenizers share, and the one without a file."""

import abc
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer

from xlstm_jax.errors import ConfigError, quote


@runtime_checkable  # so that signatures can be checked at run time
class Tokenizer(Protocol):
    """The interface of a tokenizer; an entry of `TOKENIZERS`."""

    @property
    def name(self) -> str:
        """The key in `TOKENIZERS`, or the kind of its file; recorded in descriptions of data."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, `eos_id` and added tokens included."""

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""

    @property
    def sha256(self) -> str:
        """Identifies what determines the ids."""

    @property
    def token_bytes(self) -> Int32[np.ndarray, "V"]:
        """Bytes of text that each id encodes; 0 for special tokens such as `eos_id`."""

    def encode(self, text: str | bytes) -> Integer[np.ndarray, "T"]:
        """Token ids of a text, without `eos_id` at the end."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[Integer[np.ndarray, "_"]]:
        """The ids of several texts, each as `encode` gives them."""

    def decode(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> str:
        """The text of token ids; special tokens have none."""

    def num_bytes(self, ids: Integer[np.ndarray, "*T"] | Sequence[int]) -> int:
        """Bytes of text that the ids encode: the divisor of bits per byte."""

    def save(self, folder: Path) -> None:
        """Writes files from which `get(folder)` loads this tokenizer; none for one with a key."""


class BaseTokenizer(abc.ABC):
    """The methods that follow from the other ones; for implementations of `Tokenizer`."""

    name: str
    vocab_size: int
    token_bytes: Int32[np.ndarray, "V"]

    @abc.abstractmethod
    def encode(self, text: str | bytes) -> Integer[np.ndarray, "T"]:
        """Token ids of a text, without `eos_id` at the end."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[Integer[np.ndarray, "_"]]:
        """The ids of several texts."""
        return [self.encode(text) for text in texts]

    def num_bytes(self, ids: Integer[np.ndarray, "*T"] | Sequence[int]) -> int:
        """Bytes of text that the ids encode. Raises ConfigError for an unknown id."""
        return int(self.token_bytes[self.known(ids)].sum(dtype=np.int64))

    def save(self, folder: Path) -> None:  # noqa: B027
        """Writes nothing: the name is enough."""

    def known(self, ids: Integer[np.ndarray, "*T"] | Sequence[int]) -> Integer[np.ndarray, "*T"]:
        """The ids as an array; raises ConfigError if one is outside of the vocabulary."""
        ids = np.asarray(ids)
        if ids.size == 0:
            return ids.astype(np.int64)
        # The range is checked in the type of the ids; a narrower one could wrap an invalid id.
        for extreme in (ids.min(), ids.max()):
            if not 0 <= extreme < self.vocab_size:
                raise ConfigError(
                    f"ids must be in 0..{self.vocab_size - 1} for tokenizer={quote(self.name)}, "
                    f"got {extreme}; decode with the tokenizer that encoded them."
                )
        return ids


def to_bytes(text: str | bytes) -> bytes:
    """UTF-8 text as bytes.

    A string that Python decoded with "surrogateescape", as it does with command-line arguments, is
    encoded to its original bytes. Raises ConfigError for any other surrogate.
    """
    if not isinstance(text, str):
        return text
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"text must have no surrogates, got U+{ord(text[error.start]):04X} at character "
            f"{error.start:,}; remove it."
        ) from error


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(BaseTokenizer):
    """One id per byte of UTF-8 text, and id 256 for the end of a document."""

    name: str = "byte"
    vocab_size: int = 257
    eos_id: int = 256
    sha256: str = hashlib.sha256(b"byte: id 256 ends a document").hexdigest()
    token_bytes: Int32[np.ndarray, "V"] = dataclasses.field(
        default_factory=lambda: np.array([1] * 256 + [0], np.int32), repr=False, compare=False
    )

    def encode(self, text: str | bytes) -> Integer[np.ndarray, "T"]:
        """The bytes of a text as ids, without `eos_id` at the end; they need not be valid UTF-8."""
        return np.frombuffer(to_bytes(text), np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> bytes:
        """The exact bytes of token ids; `eos_id` has none. Raises ConfigError for an unknown id."""
        ids = self.known(ids)
        return ids[ids != self.eos_id].astype(np.uint8).tobytes()

    def decode(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> str:
        """The text of token ids; invalid UTF-8 becomes U+FFFD. Raises like `decode_bytes`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")
