"""The table of tokenizers, and the loading of those that are files."""

import functools
import os
from pathlib import Path

from xlstm_jax import hub
from xlstm_jax.config import user_path
from xlstm_jax.data.tokenizers import files, huggingface, locate, sentence_piece
from xlstm_jax.data.tokenizers.protocol import ByteTokenizer, Tokenizer
from xlstm_jax.errors import ConfigError, quote

TOKENIZERS: dict[str, Tokenizer] = {"byte": ByteTokenizer()}


def get(name_or_path: str) -> Tokenizer:
    """The tokenizer with a name, or in a file.

    Args:
        name_or_path: a key of `TOKENIZERS`, the path of a tokenizer.json or of a sentencepiece
            model, a folder with one of them, or hf://ORG/NAME[@REVISION].

    Raises:
        ConfigError: it is unknown, or its file is damaged.
    """
    if name_or_path in TOKENIZERS:
        return TOKENIZERS[name_or_path]
    if not (hub.is_address(name_or_path) or os.path.exists(user_path(name_or_path))):
        known = ", ".join(map(repr, TOKENIZERS))
        raise ConfigError(
            f"tokenizer={quote(name_or_path)} is not known; use one of: {known}, or the path of "
            "a tokenizer.json, of a sentencepiece .model or of a folder with one, or hf://ORG/NAME."
        )
    path = locate.find(name_or_path)
    names = (path.name, files.CONFIG, files.SPECIAL_TOKENS, files.TEMPLATE)
    return _load(path, tuple(files.stamp(path.with_name(name)) for name in names))


@functools.lru_cache(maxsize=4)
def _load(path: Path, stamps: tuple[tuple[int, int], ...]) -> Tokenizer:
    """Loads a tokenizer; `stamps` change with its files, so that a changed file is read again."""
    contents = files.read_files(path)
    if path.suffix == ".json":
        return huggingface.load(contents)
    return sentence_piece.load(contents)
