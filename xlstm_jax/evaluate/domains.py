"""Loss on many domains of text, and the number of domains in which one model beats another."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from xlstm_jax.config import check_range
from xlstm_jax.data.documents import File, find, find_files, read
from xlstm_jax.data.documents.files import COMPRESSED
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import ArgumentError, ConfigError, quote, quote_path
from xlstm_jax.evaluate.lengths import check_length
from xlstm_jax.evaluate.scoring import TokenSequence, score_sequences, windows_of_document
from xlstm_jax.generate.arguments import check_tokenizer
from xlstm_jax.modules.lm import LM

GROUP = 256
"""Batches of windows that are sorted by length together: few padded positions, bounded memory."""


class Domain(NamedTuple):
    """Loss of a domain; every token counts; `exp(nats_per_token)` is the perplexity."""

    nats_per_token: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    num_documents: int


class Wins(NamedTuple):
    """Domains in which the first of two results has the lower loss."""

    num_wins: int
    num_ties: int
    num_domains: int


def by_domain(
    model: LM,
    variables: Any,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    seq_len: int = 2048,
    batch_size: int = 16,
) -> dict[str, Domain]:
    """The loss of every domain of a folder, by name.

    A document is divided into windows of `seq_len` tokens, each predicted from the initial state,
    and the last one is filled up with preceding tokens that are not scored again. Every token is
    scored once, the first one after the token that ends documents. Source: PALOMA, Magnusson et al.
    2023, arXiv:2312.10523, as in Beck et al. 2024, arXiv:2405.04517, tables 9 and 10.

    Args:
        folder: one subfolder or file per domain, with text in any format that training reads. The
            name of a file is its domain, without suffixes.
        seq_len: tokens per window; the length in training.
        batch_size: windows per forward pass; affects only speed and memory.

    Raises:
        ConfigError: the folder or a domain has no text, or a file cannot be read.
        ArgumentError: `seq_len` exceeds the attention cache of the model, or token ids its
            vocabulary.
    """
    check_range("seq_len", seq_len, "at least 1", "the default is 2048")
    check_range("batch_size", batch_size, "at least 1")
    check_length(model.cfg, "seq_len", seq_len)
    check_tokenizer(tokenizer, model.cfg.vocab_size)
    domains = find_domains(folder)
    return {
        name: _domain(model, variables, tokenizer, name, files, seq_len, batch_size)
        for name, files in sorted(domains.items())
    }


def find_domains(folder: str | Path) -> dict[str, list[File]]:
    """The files of every domain of a folder; raises ConfigError if it or a domain has none."""
    root = find(str(folder))
    if root is None or not root.is_dir():
        raise ConfigError(
            f"the folder of domains must be a folder, got {quote_path(folder)}, which "
            f"{'does not exist' if root is None else 'is a file'}; check the path."
        )
    entries = [path for path in root.iterdir() if not path.name.startswith(".")]
    if not entries:
        raise ConfigError(
            f"{quote_path(folder)} must have one subfolder or file per domain, but it is empty; "
            "add text."
        )
    domains: dict[str, list[File]] = {p.name: [] for p in sorted(entries) if p.is_dir()}
    has_files = {name: any(p.is_file() for p in (root / name).rglob("*")) for name in domains}
    for file in find_files(str(folder), split="train") if all(has_files.values()) else ():
        first, *rest = PurePath(file.name).parts
        domains.setdefault(first if rest else _without_suffixes(first), []).append(file)
    for name, files in domains.items():
        if not files:
            raise ConfigError(
                f"domain {quote(name)} of {quote_path(folder)} must have files with text, but has "
                "none; add text, or remove the folder."
            )
    return domains


def _without_suffixes(name: str) -> str:
    path = PurePath(name)
    return PurePath(path.stem).stem if path.suffix in COMPRESSED else path.stem


def _domain(
    model: LM,
    variables: Any,
    tokenizer: Tokenizer,
    name: str,
    files: list[File],
    seq_len: int,
    batch_size: int,
) -> Domain:
    nats, num_tokens, num_bytes, num_documents = 0.0, 0, 0, 0
    windows: list[TokenSequence] = []

    def flush() -> float:
        scores = score_sequences(model, variables, windows, batch_size=batch_size)
        windows.clear()
        return -math.fsum(score.logprob for score in scores)

    for text in _documents(files):
        ids = tokenizer.encode(text)
        num_documents += 1
        num_tokens += len(ids)
        num_bytes += len(text)
        windows += windows_of_document(ids, tokenizer.eos_id, seq_len)
        if len(windows) >= GROUP * batch_size:
            nats += flush()
    if not num_tokens:
        raise ConfigError(
            f"domain {quote(name)} must have at least one token, got none in "
            f"{', '.join(quote_path(file.path) for file in files[:3])}; add text, or remove it."
        )
    nats += flush()
    bits = nats / math.log(2) / num_bytes
    return Domain(nats / num_tokens, bits, num_tokens, num_bytes, num_documents)


def _documents(files: list[File]) -> Iterator[bytes]:
    """The documents of files, each in one piece."""
    for file in files:
        parts: list[bytes] = []
        for _, document in read(file):
            parts.append(document.data)
            if document.is_last:
                yield b"".join(parts)
                parts = []


def mean_loss(domains: Mapping[str, Domain]) -> Domain:
    """All domains as one: their losses weighted by tokens."""
    nats = math.fsum(d.nats_per_token * d.num_tokens for d in domains.values())
    num_tokens, num_bytes, num_documents = np.sum([d[2:] for d in domains.values()], axis=0)
    bits = nats / math.log(2) / num_bytes
    counts = int(num_tokens), int(num_bytes), int(num_documents)
    return Domain(float(nats / num_tokens), float(bits), *counts)


def wins(a: Mapping[str, Domain], b: Mapping[str, Domain]) -> Wins:
    """The number of domains in which `a` needs fewer bits per byte than `b`, with any tokenizers.

    Args:
        a, b: results of `by_domain` on the same folder.

    Raises:
        ArgumentError: they have different domains, or texts.
    """
    others = sorted(a.keys() ^ b.keys()) or sorted(n for n in a if a[n].num_bytes != b[n].num_bytes)
    if others:
        raise ArgumentError(
            f"both results must have the same domains, but they differ in {quote(others[0])}; "
            "evaluate both models on one folder."
        )
    differences = [a[name].bits_per_byte - b[name].bits_per_byte for name in a]
    num_wins = sum(difference < 0 for difference in differences)
    num_ties = sum(difference == 0 for difference in differences)
    return Wins(num_wins, num_ties, len(a))
