"""Base class of tokenizers that are read from files."""

import abc
import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Integer

from xlstm_jax.data.tokenizers.files import TokenizerFiles
from xlstm_jax.data.tokenizers.protocol import BaseTokenizer, to_bytes
from xlstm_jax.errors import ConfigError, quote, quote_path

MAX_VOCAB = 1 << 24
"""Limit of ids: more do not fit in a file of at most 256 MiB."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FileTokenizer(BaseTokenizer):
    """A tokenizer whose file a library reads; subclasses call the library."""

    name: str  # of the file that `save` writes
    vocab_size: int
    eos_id: int
    eos_token: str
    special: Bool[np.ndarray, "V"]  # whether an id has no text
    token_bytes: Int32[np.ndarray, "V"]
    files: TokenizerFiles

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file."""
        return hashlib.sha256(self.files.data).hexdigest()

    @abc.abstractmethod
    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        """The ids of each text, by the library."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids that are not special, by the library."""

    def encode(self, text: str | bytes) -> Integer[np.ndarray, "T"]:
        """Token ids of UTF-8 text; raises ConfigError if it is not UTF-8."""
        return self.encode_batch([to_bytes(text)])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[Integer[np.ndarray, "_"]]:
        """The ids of several texts, at the speed of the library. Raises as `encode`."""
        strings = [self.to_str(text) for text in texts]
        with library_errors(self.files.path, "cannot encode a text"):
            return [self.to_array(ids) for ids in self._encode(strings)]

    def decode(self, ids: Integer[np.ndarray, "T"] | Sequence[int]) -> str:
        """The text of token ids; special ones have none. Raises ConfigError for an unknown id."""
        ids = self.known(ids)
        with library_errors(self.files.path, "cannot decode ids"):
            return self._decode(ids[~self.special[ids]].tolist())

    def save(self, folder: Path) -> None:
        """Writes the file, tokenizer_config.json, and chat_template.jinja if it exists."""
        self.files.save(folder, self.name, self.eos_token)

    def to_str(self, text: bytes) -> str:
        """Decodes a text; raises ConfigError if it is not UTF-8."""
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"text must be UTF-8 for tokenizer={quote(self.name)}, but byte {error.start:,} "
                "is not; correct the text, or use tokenizer='byte'."
            ) from error

    def to_array(self, ids: Sequence[int]) -> Integer[np.ndarray, "_"]:
        """Ids in two bytes each, or in four if the vocabulary needs them."""
        # Faster than `np.array`, and cheap beside the tokenization itself.
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        return np.fromiter(ids, dtype, len(ids))


def check_vocab_size(size: int, path: Path) -> int:
    """The size of a vocabulary; raises ConfigError if no file of a tokenizer can have it."""
    if 0 < size <= MAX_VOCAB:
        return size
    raise ConfigError(
        f"{quote_path(path)} must have ids in 0..{MAX_VOCAB - 1}, got {size:,} of them; fetch it "
        "again."
    )


@contextlib.contextmanager
def library_errors(path: Path, what: str) -> Iterator[None]:
    """Raises errors of a tokenizer library as a ConfigError that names the file."""
    try:
        yield
    except (ConfigError, OSError):  # of the reader of a text
        raise
    except BaseException as error:
        # Errors of `tokenizers` are plain exceptions, or panics of Rust. The type of the latter
        # cannot be imported, and is no Exception.
        kind = type(error)
        is_panic = (kind.__module__, kind.__name__) == ("pyo3_runtime", "PanicException")
        if not (is_panic or isinstance(error, Exception)):
            raise
        raise ConfigError(
            f"{quote_path(path)} {what} ({quote(str(error))}); fetch it again, or use another "
            "tokenizer."
        ) from error
