"""Tokenizers from a tokenizer.json, by the library `tokenizers`."""

import base64
import binascii
import dataclasses
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from xlstm_jax.data.tokenizers import files
from xlstm_jax.data.tokenizers.from_file import FileTokenizer, check_vocab_size, library_errors
from xlstm_jax.errors import ConfigError, import_optional, quote, quote_path

MAX_TOKEN = 1 << 14
"""Characters of a token. Longer ones, of no real vocabulary, overflow the stack of the library,
which frees the tree of tokens by recursion."""

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class HuggingFaceTokenizer(FileTokenizer):
    """The ids that `tokenizers` gives, without truncation, padding and added special tokens."""

    inner: Any  # tokenizers.Tokenizer

    def _encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        # "fast" computes no offsets.
        encodings = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return (encoding.ids for encoding in encodings)

    def _decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

    def encode_offsets(
        self, text: str
    ) -> tuple[Integer[np.ndarray, "T"], Int64[np.ndarray, "T 2"]]:
        """The ids of a text, and the characters (start, stop) that each encodes."""
        with library_errors(self.files.path, "cannot encode a text"):
            encoding = self.inner.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return self.to_array(encoding.ids), offsets


def load(contents: files.TokenizerFiles) -> HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json; raises ConfigError if it is damaged."""
    path = quote_path(contents.path)
    tokenizers = import_optional("tokenizers", path, install="xlstm-jax[data]")
    values = files.parse_json(contents.data, contents.path)
    _check(values, contents.path)
    with library_errors(contents.path, "is not a valid tokenizer.json"):
        inner = tokenizers.Tokenizer.from_buffer(contents.data)
        inner.no_truncation()
        inner.no_padding()
        # It adds special tokens, which are not wanted, and removes spaces from offsets.
        inner.post_processor = None
        if getattr(inner.model, "dropout", None) is not None:
            inner.model.dropout = None  # random merges; data are deterministic
        vocab = inner.get_vocab(with_added_tokens=True)
        added = inner.get_added_tokens_decoder()
        kinds = {part["type"] for part in _parts(values.get("decoder")) if "type" in part}
        sizes = _byte_level_sizes(inner) if "ByteLevel" in kinds else _sizes(inner, kinds)
    vocab_size = check_vocab_size(1 + max(vocab.values(), default=-1), contents.path)
    eos_token = contents.eos_token(vocab)
    special = np.zeros(vocab_size, np.bool_)
    special[[i for i, token in added.items() if token.special]] = True
    special[vocab[eos_token]] = True
    token_bytes = np.zeros(vocab_size, np.int32)
    token_bytes[list(sizes)] = list(sizes.values())
    token_bytes[special] = 0
    return HuggingFaceTokenizer(
        name=files.JSON,
        vocab_size=vocab_size,
        eos_id=vocab[eos_token],
        eos_token=eos_token,
        special=special,
        token_bytes=token_bytes,
        files=contents,
        inner=inner,
    )


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    """A component of a tokenizer.json, such as its decoder, and all components within it."""
    if isinstance(component, Mapping):
        yield component
        for value in component.values():
            yield from _parts(value)
    elif isinstance(component, list):
        for value in component:
            yield from _parts(value)


def _byte_level_sizes(inner: Any) -> dict[int, int]:
    """Bytes of text of each id: a character per byte, but an added token is text itself."""
    sizes = {i: len(token) for token, i in inner.get_vocab(with_added_tokens=True).items()}
    added = inner.get_added_tokens_decoder()
    return sizes | {i: len(token.content.encode()) for i, token in added.items()}


def _sizes(inner: Any, kinds: Container[str]) -> dict[int, int]:
    """Bytes that each id adds to a decoded text, given the kinds of the decoder's parts.

    Exact for pieces of sentencepiece. A space that the tokenizer adds before a text counts.
    """
    vocab = inner.get_vocab(with_added_tokens=True)
    ids = list(vocab.values())
    # Twice, because the first token of a text may lose a space or keep a mark of continuation.
    once = inner.decode_batch([[i] for i in ids], skip_special_tokens=False)
    twice = inner.decode_batch([[i, i] for i in ids], skip_special_tokens=False)
    added = [len(b.encode()) - len(a.encode()) for a, b in zip(once, twice, strict=True)]
    sizes = dict(zip(ids, added, strict=True))
    if "ByteFallback" in kinds:  # byte tokens, which are not text by themselves
        sizes |= {i: 1 for token, i in vocab.items() if _BYTE_TOKEN.fullmatch(token)}
    return sizes


def _check(values: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError for contents that end the process when the library reads them."""
    model = values.get("model")
    model = model if isinstance(model, Mapping) else {}
    tokens = [
        item[0] if isinstance(item, list) and item else item for item in _items(model, "vocab")
    ]
    longest = max((len(token) for token in tokens if isinstance(token, str)), default=0)
    if longest > MAX_TOKEN:
        raise ConfigError(
            f"{quote_path(path)}: tokens must have at most {MAX_TOKEN:,} characters, got one of "
            f"{longest:,}; fetch it again."
        )
    if isinstance(prefix := model.get("continuing_subword_prefix"), str):
        _check_merges(_items(model, "merges"), prefix, path)
    for part in _parts(values.get("normalizer")):
        if "precompiled_charsmap" in part:
            _check_charsmap(part["precompiled_charsmap"], path)


def _items(model: Mapping[str, Any], name: str) -> Iterable[Any]:
    """The tokens or merges of a model; none if they are neither a list nor a table."""
    value = model.get(name)
    return value if isinstance(value, (Mapping, list)) else ()


def _check_merges(merges: Iterable[Any], prefix: str, path: Path) -> None:
    """Checks the second parts of merges, of which the library removes a prefix unseen."""
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        second = parts[-1] if isinstance(parts, list) and parts else None
        if isinstance(second, str) and not second.startswith(prefix):
            raise ConfigError(
                f"{quote_path(path)}: the second part of a merge must start with "
                f"continuing_subword_prefix={quote(prefix)}, got {quote(merge)}; fetch it again."
            )


def _check_charsmap(value: Any, path: Path) -> None:
    """Checks the table of a normalizer: its length in bytes, then a trie of this length."""
    try:
        data = base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        data = b""
    if len(data) < 4 or int.from_bytes(data[:4], "little") > len(data) - 4:
        raise ConfigError(
            f"{quote_path(path)}: precompiled_charsmap must be the table of a normalizer, got "
            f"{quote(value)}; fetch it again."
        )
