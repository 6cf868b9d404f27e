"""Document lengths in constant memory, and samples."""

import numpy as np
import pytest

from xlstm_jax.data import inspect
from xlstm_jax.data.inspect import Lengths
from xlstm_jax.data.shards.store import ArrayTokens
from xlstm_jax.data.tokenizers import get


@pytest.mark.parametrize("high", [3, 1000, 1025, 10**6, 2**40])
def test_figures_of_lengths_are_those_of_the_sorted_lengths(rng, high):
    values = np.exp(rng.uniform(0, np.log(high), 5000)).astype(np.int64)
    lengths = Lengths()
    for part in np.array_split(values, 7):
        lengths.add(part)
    assert (lengths.count, lengths.total, lengths.max) == (5000, values.sum(), values.max())
    for percent in (1, 50, 90, 99, 100):
        exact = np.sort(values)[int(np.ceil(50 * percent)) - 1]
        assert lengths.percentile(percent) == pytest.approx(exact, rel=0.004)
        if high <= 1024:
            assert lengths.percentile(percent) == exact


def test_octaves_count_every_document_once():
    lengths = Lengths()
    lengths.add(np.array([1, 2, 3, 4, 7, 8, 2**20, 2**20 - 1]))
    octaves = lengths.octaves()
    assert octaves[:4] == [(1, 1, 1), (2, 3, 2), (4, 7, 2), (8, 15, 1)]
    assert octaves[-2:] == [(2**19, 2**20 - 1, 1), (2**20, 2**21 - 1, 1)]
    assert sum(count for _, _, count in octaves) == 8


def test_samples_start_at_documents(monkeypatch):
    byte = get("byte")
    texts = [f"document {i} " * (1 + i % 5) for i in range(50)]
    tokens = [np.append(byte.encode(text), np.uint16(byte.eos_id)) for text in texts]
    ends = np.cumsum([len(ids) for ids in tokens])
    store = ArrayTokens(np.concatenate(tokens), ends)
    for chunk in (1 << 24, 100):
        monkeypatch.setattr(inspect, "_CHUNK", chunk)
        samples = inspect._samples(store, 10, byte)
        assert len(set(samples)) == 10 and set(samples) <= set(texts)
        lengths = inspect._lengths(store)
        assert lengths.count == 50 and lengths.total == store.num_tokens


def test_fewer_documents_than_samples_are_shown_once():
    store = ArrayTokens(np.frombuffer(b"ab\0cd\0", np.uint8).astype(np.uint16), np.array([3, 6]))
    assert len(inspect._samples(store, 5, get("byte"))) == 2


def test_a_long_document_is_shown_in_part():
    store = ArrayTokens(np.full(10_000, 97, np.uint16), np.array([10_000]))
    assert inspect._samples(store, 1, get("byte")) == ["a" * inspect.SAMPLE_TOKENS]
