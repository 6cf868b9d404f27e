"""Text to token ids and back."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from xlstm_jax.config import ConfigError


@runtime_checkable  # so that signatures can be checked at run time
class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    def encode(self, text: str | bytes) -> Integer[np.ndarray, "T"]: ...
    def decode(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> str: ...
    def num_bytes(self, ids: Integer[np.ndarray, "*T"] | Sequence[int]) -> int: ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One id per byte of the UTF-8 text, then 256 for the end of a document."""

    name: str = "byte"
    vocab_size: int = 257
    eos_id: int = 256

    def encode(self, text: str | bytes) -> Integer[np.ndarray, "T"]:
        """The bytes as ids; the end of a document is added by whoever closes one.

        Bytes need not be valid UTF-8. A string that Python read with "surrogateescape", as it does
        with command-line arguments, gives back the bytes it was read from.
        """
        if isinstance(text, str):
            text = text.encode("utf-8", errors="surrogateescape")
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> bytes:
        """The exact bytes; ends of documents vanish.

        Raises:
            ConfigError: an id outside the vocabulary.
        """
        ids = np.asarray(ids, np.int64)
        strange = ids[(ids < 0) | (ids >= self.vocab_size)]
        if strange.size:
            raise ConfigError(
                f"ids must lie in 0..{self.vocab_size - 1} for tokenizer={self.name!r}, "
                f"got {strange[0]}; decode with the tokenizer the ids were made with."
            )
        return ids[ids != self.eos_id].astype(np.uint8).tobytes()

    def decode(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD. Raises as `decode_bytes`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def num_bytes(self, ids: Integer[np.ndarray, "*T"] | Sequence[int]) -> int:
        """Bytes of text these ids stand for; the end of a document stands for none."""
        return int(np.count_nonzero(np.asarray(ids) != self.eos_id))


TOKENIZERS: dict[str, Tokenizer] = {"byte": ByteTokenizer()}


def get(name: str) -> Tokenizer:
    """The tokenizer of that name.

    Raises:
        ConfigError: there is none; names those there are.
    """
    if name not in TOKENIZERS:
        known = ", ".join(repr(known) for known in TOKENIZERS)
        raise ConfigError(f"tokenizer={name!r} is not known; use one of: {known}.")
    return TOKENIZERS[name]
