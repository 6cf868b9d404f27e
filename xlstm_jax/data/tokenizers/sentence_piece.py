"""Tokenizers from a model of `sentencepiece`."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from xlstm_jax.data.tokenizers import files
from xlstm_jax.data.tokenizers.from_file import FileTokenizer, check_vocab_size, library_errors
from xlstm_jax.errors import ConfigError, import_optional, quote, quote_path

_SPACE = "\u2581"  # stands for a space in a piece


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SentencePieceTokenizer(FileTokenizer):
    """The ids that `sentencepiece` gives."""

    inner: Any  # sentencepiece.SentencePieceProcessor

    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        return iter(self.inner.encode(list(texts), out_type=int))

    def _decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)

    @functools.cached_property
    def special_ids(self) -> Mapping[str, int]:
        """Special tokens, which the library does not recognize in a text."""
        return {self.inner.id_to_piece(i): i for i in np.flatnonzero(self.special).tolist()}


def load(contents: files.TokenizerFiles) -> SentencePieceTokenizer:
    """The tokenizer of a sentencepiece model; raises ConfigError if it is damaged."""
    path = quote_path(contents.path)
    sentencepiece = import_optional("sentencepiece", path, install="xlstm-jax[data]")
    with library_errors(contents.path, "is not a valid sentencepiece model"):
        inner = sentencepiece.SentencePieceProcessor(model_proto=contents.data)
        size = check_vocab_size(inner.get_piece_size(), contents.path)
        # Pieces of a damaged model may not be UTF-8; the library decodes them here.
        pieces = {inner.id_to_piece(i): i for i in range(size)}
        special = np.array([inner.is_control(i) or inner.is_unused(i) for i in range(size)])
    _refuse_added_tokens(contents, size)
    eos_token = _eos_token(contents, inner, pieces)
    special[pieces[eos_token]] = True
    sizes = [0 if inner.is_unknown(i) else _size(inner, i) for i in range(size)]
    token_bytes = np.where(special, 0, np.array(sizes)).astype(np.int32)
    return SentencePieceTokenizer(
        name=files.MODEL,
        vocab_size=size,
        eos_id=pieces[eos_token],
        eos_token=eos_token,
        special=special,
        token_bytes=token_bytes,
        files=contents,
        inner=inner,
    )


def _size(inner: Any, i: int) -> int:
    """Bytes of text of a piece. A space that the tokenizer adds before a text counts."""
    return 1 if inner.is_byte(i) else len(inner.id_to_piece(i).replace(_SPACE, " ").encode())


def _eos_token(contents: files.TokenizerFiles, inner: Any, pieces: Mapping[str, int]) -> str:
    """The token that the settings name, else that of the model, else one that is well known."""
    if "eos_token" not in contents.settings and 0 <= inner.eos_id() < len(pieces):
        return inner.id_to_piece(inner.eos_id())
    return contents.eos_token(pieces)


def _refuse_added_tokens(contents: files.TokenizerFiles, size: int) -> None:
    """Raises ConfigError for tokens beside the model, whose ids the library does not know."""
    added = contents.settings.get("added_tokens_decoder")
    names = added if isinstance(added, Mapping) else {}
    beyond = [name for name in names if not (name.isdecimal() and int(name[:12]) < size)]
    if beyond:
        raise ConfigError(
            f"{quote_path(contents.path.parent / files.CONFIG)} adds the token {quote(beyond[0])}, "
            f"but the model has {size} pieces; save a tokenizer.json, which holds added tokens."
        )
