"""Counts, document lengths and samples of prepared tokens and of raw files, in constant memory."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from xlstm_jax.data.config import SPLITS, Split
from xlstm_jax.data.documents import find_files, read
from xlstm_jax.data.shards.manifest import TokenizerInfo, read_manifest
from xlstm_jax.data.shards.open import ALL, Opened, kind_of, open_tokens
from xlstm_jax.data.shards.store import TokenStore
from xlstm_jax.data.tokenizers import Tokenizer, get

_CHUNK = 1 << 24  # tokens whose document ends are read at once
_BITS = 10  # of a length that the histogram distinguishes: errors are below 0.2 %
SAMPLE_TOKENS, SAMPLE_BYTES = 200, 800
"""Length of the samples that are shown."""


class Lengths:
    """A histogram of the lengths of documents, with bins of at most 0.2 % of their length."""

    def __init__(self):
        self._counts = np.zeros(64 << _BITS, np.int64)
        self.total = self.max = 0

    @property
    def count(self) -> int:
        """Number of documents."""
        return int(self._counts.sum())

    def add(self, lengths: Integer[np.ndarray, "D"]) -> None:
        """Counts documents with these lengths."""
        if not len(lengths):
            return
        self.total, self.max = self.total + int(lengths.sum()), max(self.max, int(lengths.max()))
        # As in a floating-point number: the exponent, and the leading bits.
        shift = np.maximum(np.frexp(lengths.astype(np.float64))[1] - _BITS, 0).astype(np.int64)
        bins = (shift << (_BITS - 1)) + (lengths >> shift)
        np.add.at(self._counts, bins, 1)

    def percentile(self, percent: float) -> int:
        """The length of which this share of the documents is not longer."""
        needed = max(1, int(np.ceil(self.count * percent / 100)))
        return min(int(_length(int(np.searchsorted(np.cumsum(self._counts), needed)))), self.max)

    def octaves(self) -> list[tuple[int, int, int]]:
        """(shortest, longest, documents) of lengths 0, 1, 2-3, 4-7, ... that occur."""
        bins = np.flatnonzero(self._counts)
        octaves: dict[int, int] = {}
        for number in bins.tolist():
            octave = _length(number).bit_length()
            octaves[octave] = octaves.get(octave, 0) + int(self._counts[number])
        low, high = min(octaves, default=1), max(octaves, default=0)
        return [(1 << o >> 1, (1 << o) - 1, octaves.get(o, 0)) for o in range(low, high + 1)]


def _length(number: int) -> int:
    """The smallest length in a bin."""
    if number < 1 << _BITS:
        return number
    shift = (number >> (_BITS - 1)) - 1
    return (number - (shift << (_BITS - 1))) << shift


class SplitSummary(NamedTuple):
    """The contents of a split."""

    tokens: int | None  # None: raw files
    num_bytes: int | None  # of text; None: the format does not store them
    lengths: Lengths  # in tokens with that which ends a document, or of raw files in bytes
    samples: Sequence[str]


class Inspection(NamedTuple):
    """The contents of a folder."""

    kind: str  # "prepared", "megatron", ..., or "raw"
    tokenizer: TokenizerInfo | None
    splits: dict[str, SplitSummary]


def inspect(
    source: str,
    split: Split | None = None,
    *,
    num_samples: int = 3,
    tokenizer: str | None = None,
    pattern: str | None = None,
    text_field: str = "text",
) -> Inspection:
    """Reads the data at a path once, except for the tokens of prepared data.

    Args:
        split: the only one to read; None: all.
        tokenizer: decodes the samples; None: that of the data, without which ids are shown.
        pattern, text_field: of raw files, as in `DataConfig`.

    Raises:
        ConfigError: the data do not exist, or a file is damaged.
    """
    kind = kind_of(source)
    if kind is None:
        return Inspection(
            "raw", None, _inspect_raw(source, split, num_samples, pattern, text_field)
        )
    if split is not None:
        names: Sequence[str] = [split]
    else:  # other formats may name none
        names = list(read_manifest(source).splits) if kind == "prepared" else [ALL]
    summaries, info = {}, None
    for name in names:
        opened = open_tokens(source, name, verify="size", block_len=1 << 16, max_blocks=16)
        info, store = opened.tokenizer, opened.store
        decoder = _tokenizer(opened, tokenizer) if num_samples else None
        samples = _samples(store, num_samples, decoder)
        summaries[name] = SplitSummary(store.num_tokens, opened.num_bytes, _lengths(store), samples)
    return Inspection(kind, info, summaries)


def _tokenizer(opened: Opened, name: str | None) -> Tokenizer | None:
    if name is None and opened.tokenizer is not None:
        path = opened.tokenizer_path  # absent for a tokenizer of the table
        name = path if path is not None and os.path.isdir(path) else opened.tokenizer.name
    return None if name is None else get(name)


def _lengths(store: TokenStore) -> Lengths:
    lengths, last = Lengths(), 0
    for start in range(0, store.num_tokens, _CHUNK):
        ends = store.ends(start, min(start + _CHUNK, store.num_tokens))
        if len(ends):
            lengths.add(np.diff(ends, prepend=last))
            last = int(ends[-1])
    return lengths


def _samples(store: TokenStore, count: int, tokenizer: Tokenizer | None) -> list[str]:
    """The beginnings of documents at evenly spaced positions, each once."""
    samples = {}
    for number in range(count):
        position = store.num_tokens * (2 * number + 1) // (2 * count)
        low = max(0, position - _CHUNK)
        before = store.ends(low, position) if position else np.zeros(1, np.int64)
        start = int(before[-1]) if len(before) else low
        stop = min(start + SAMPLE_TOKENS, store.num_tokens)
        stop = int(min([stop, *store.ends(start, stop)[:1]]))
        ids = store.read(start, stop)
        samples[start] = str(ids.tolist()) if tokenizer is None else tokenizer.decode(ids)
    return list(samples.values())


def _inspect_raw(
    source: str, split: Split | None, num_samples: int, pattern: str | None, text_field: str
) -> dict[str, SplitSummary]:
    lengths = {name: Lengths() for name in SPLITS if split in (None, name)}
    samples: dict[str, list[str]] = {name: [] for name in lengths}
    sizes = dict.fromkeys(lengths, 0)  # of the pieces of a document so far
    for file in find_files(source, pattern):
        for name, document in read(file, text_field=text_field):
            if name not in lengths:
                continue
            if len(samples[name]) < num_samples and not sizes[name]:
                samples[name].append(document.data[:SAMPLE_BYTES].decode(errors="replace"))
            sizes[name] += len(document.data)
            if document.is_last:
                lengths[name].add(np.array([sizes[name]]))
                sizes[name] = 0
    return {
        name: SplitSummary(None, histogram.total, histogram, samples[name])
        for name, histogram in lengths.items()
        if histogram.count
    }
