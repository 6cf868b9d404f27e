"""The manifest of prepared data: its shards, and the tokenizer of their tokens."""

import dataclasses
import json
import posixpath
from collections.abc import Mapping
from typing import Any

import numpy as np

from xlstm_jax.config import parse_json
from xlstm_jax.config.fields import check_fields, from_dict, to_dict
from xlstm_jax.data.shards import remote
from xlstm_jax.errors import ConfigError, quote

NAME, TOKENIZER_FOLDER, VERSION = "manifest.json", "tokenizer", 1
MAX_BYTES = 1 << 28  # of a manifest.json: about 500,000 shards
SUFFIXES = (".bin", ".ends", ".loss")
"""Files of a shard: tokens, ends of documents, and the mask of the loss (chat only)."""


def token_dtype(vocab_size: int) -> str:
    """The dtype of stored tokens: two bytes suffice for 65,536 ids."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard of a split; its files are `SPLIT/NAME.bin`, `.ends` and, for chat, `.loss`."""

    name: str  # five digits or more: the number of its input shard
    tokens: int  # with the end-of-document tokens
    documents: int
    num_bytes: int  # of text: the divisor of bits per byte
    sha256: dict[str, str]  # by suffix of the file

    def __post_init__(self):
        check_fields(self, "manifest: ", {})
        if not (self.name.isascii() and self.name.isdigit()):
            raise ConfigError(
                f"manifest: name must be the number of a shard, got {quote(self.name)}."
            )
        if self.num_bytes < 0 or not 0 < self.documents <= self.tokens < 1 << 62:
            raise ConfigError(
                f"manifest: shard {self.name} has impossible counts ({self.tokens} tokens, "
                f"{self.documents} documents, {self.num_bytes} bytes); prepare the data again."
            )
        if not {".bin", ".ends"} <= set(self.sha256) <= set(SUFFIXES):
            raise ConfigError(
                f"manifest: sha256 of shard {self.name} must name .bin and .ends, got "
                f"{quote(sorted(self.sha256))}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer that made the tokens."""

    name: str  # "byte", or the kind of the file in `tokenizer/`
    sha256: str  # of what determines its ids
    vocab_size: int
    eos_id: int

    def __post_init__(self):
        check_fields(self, "manifest: tokenizer.", {"at least 1": "vocab_size"})
        if not 0 <= self.eos_id < self.vocab_size:
            raise ConfigError(
                f"manifest: tokenizer.eos_id must be in 0..{self.vocab_size - 1}, got "
                f"{self.eos_id}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """All shards of prepared data, by split, in order."""

    version: int = VERSION
    tokenizer: TokenizerInfo
    dtype: str  # of the .bin files, little-endian
    sources: dict[str, Any]  # what was prepared, and how: for people
    splits: dict[str, tuple[ShardInfo, ...]]

    def __post_init__(self):
        if self.version != VERSION:
            raise ConfigError(
                f"manifest: version must be {VERSION}, got {self.version}; use the version of "
                "xlstm-jax that wrote it, or prepare the data again."
            )
        if self.dtype != (expected := token_dtype(self.tokenizer.vocab_size)):
            raise ConfigError(f"manifest: dtype must be {expected!r}, got {quote(self.dtype)}.")


def read_manifest(folder: str) -> Manifest:
    """Reads the manifest of a folder or URL; raises ConfigError, with the path, if it is none."""
    path = posixpath.join(folder, NAME)
    try:
        data = remote.read_bytes(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{error}, so the preparation of these data is not finished; run `xlstm-jax data "
            "prepare` again, which resumes it."
        ) from error
    try:
        return from_dict(Manifest, parse_json(data, NAME))
    except ConfigError as error:
        raise ConfigError(f"{remote.shown(path)}: {error}") from error


def to_json(manifest: Manifest) -> str:
    """The text of a manifest.json."""
    return json.dumps(to_dict(manifest), indent=1) + "\n"


def file_sizes(info: ShardInfo, dtype: str) -> Mapping[str, int]:
    """The bytes of each file of a shard, by suffix."""
    item = np.dtype(dtype).itemsize
    sizes = {".bin": info.tokens * item, ".ends": info.documents * 8, ".loss": info.tokens}
    return {suffix: sizes[suffix] for suffix in info.sha256}


def shard_path(split: str, name: str, suffix: str) -> str:
    """The path of a file of a shard, relative to the folder of the manifest."""
    return posixpath.join(split, name + suffix)
