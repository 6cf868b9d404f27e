"""Evaluation equals a direct computation from all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generate.small import model_and_variables
from tests.modules import models
from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, Windows, load
from xlstm_jax.data.shards.store import ArrayTokens
from xlstm_jax.data.tokenizers import BaseTokenizer
from xlstm_jax.errors import ArgumentError
from xlstm_jax.evaluate import by_position, perplexity, position

SEQ_LEN = 21


class Letters(BaseTokenizer):
    """A tokenizer of ten digits; token 10 ends a document."""

    name, vocab_size, eos_id, sha256 = "letters", 11, 10, ""
    token_bytes = np.array([1] * 10 + [0], np.int32)

    def encode(self, text):
        return np.array([int(letter) for letter in text], np.uint16)

    def decode(self, ids):
        return "".join(str(i) for i in ids if i != self.eos_id)


class Digits(Letters):
    """One more id than the model."""

    vocab_size = 12
    token_bytes = np.append(Letters.token_bytes, 1)


def make_windows(tokens, seq_len):
    ends = np.flatnonzero(tokens == Letters.eos_id) + 1
    return Windows(ArrayTokens(tokens, ends), seq_len, Letters(), {})


@pytest.fixture(scope="module")
def windows():
    """Seven windows, so that the second batch of four is short; documents of up to 24 tokens."""
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(0, 10, length), 10] for length in rng.permutation(24)[:12]]
    tokens = np.concatenate(documents).astype(np.uint16)[: 6 * SEQ_LEN + 9]
    tokens[-1] = 10
    return make_windows(tokens, SEQ_LEN)


@pytest.fixture(
    scope="module",
    params=["m", pytest.param(models.MIXED_BASELINES, marks=pytest.mark.slow)],
    ids=["m", "baselines"],
)
def small(request):
    if request.param == "m":
        return model_and_variables("m")
    return models.model_and_variables(models.config(request.param))


@pytest.fixture(scope="module")
def losses(small, windows):
    """Nats of every target, and the batch of all windows."""
    model, variables = small
    batch = windows.batch(np.arange(len(windows)))
    logits, _ = jax.jit(model.apply)(variables, batch.inputs, segment_ids=batch.segment_ids)
    nats = -jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(nats, batch.targets[..., None], axis=-1)[..., 0]
    return np.asarray(picked, np.float64), batch


def test_perplexity_is_the_mean_over_all_targets_of_all_batches(small, windows, losses):
    nats, batch = losses
    result = perplexity(*small, windows, batch_size=4)
    assert len(windows) % 4
    assert result.num_tokens == batch.weights.sum()
    mean = (nats * batch.weights).sum() / batch.weights.sum()
    assert result.nats_per_token == pytest.approx(mean, rel=1e-5)


def test_bits_per_byte_excludes_end_of_document_tokens_from_bytes(small, windows, losses):
    nats, batch = losses
    num_bytes = ((batch.targets != 10) * batch.weights).sum()
    assert num_bytes < batch.weights.sum()
    result = perplexity(*small, windows, batch_size=4)
    expected = (nats * batch.weights).sum() / np.log(2) / num_bytes
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_deterministic(small, windows):
    assert perplexity(*small, windows, batch_size=4) == perplexity(*small, windows, batch_size=4)


def test_max_batches_spreads_batches_over_the_data(small, windows, losses):
    nats, batch = losses
    result = perplexity(*small, windows, batch_size=4, max_batches=1)
    index = [0, 2, 4, 6]  # of seven
    weights = batch.weights[index]
    assert result.num_tokens == weights.sum()
    assert result.nats_per_token == pytest.approx(
        (nats[index] * weights).sum() / weights.sum(), rel=1e-5
    )


def test_bits_per_byte_is_none_for_synthetic_tasks(small):
    cfg = DataConfig(source="parity", seq_len=SEQ_LEN, max_len=8, num_eval_samples=5)
    examples = load(cfg, "valid")
    result = perplexity(*small, examples, batch_size=4)
    assert result.bits_per_byte is None
    assert result.num_tokens >= 5


def test_loss_by_position_equals_that_of_unsplit_windows(small, windows, losses, monkeypatch):
    """Chunks of 4 split buckets and documents; each document starts from the initial state."""
    monkeypatch.setattr(position, "CHUNK", 4)
    nats, batch = losses
    buckets = by_position(*small, windows, batch_size=4)
    assert [bucket[:2] for bucket in buckets] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 21)]
    for start, stop, mean, count in buckets:
        weights = batch.weights[:, start:stop]
        assert count == weights.sum()
        expected = (nats[:, start:stop] * weights).sum() / count
        assert mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("seq_len", "buckets"),
    [(1, [(0, 1)]), (2, [(0, 1), (1, 2)]), (8, [(0, 1), (1, 2), (2, 4), (4, 8)])],
    ids="T{}".format,
)
def test_buckets_are_powers_of_two_up_to_the_window(seq_len, buckets):
    assert list(dict.fromkeys(bucket for bucket, _, _ in position._chunks(seq_len))) == buckets


@pytest.mark.parametrize("measure", [perplexity, by_position])
def test_max_batches_0_is_rejected(small, windows, measure):
    with pytest.raises(ConfigError, match="max_batches must be at least 1, got 0"):
        measure(*small, windows, max_batches=0)


def test_token_ids_beyond_the_vocabulary_are_rejected(small):
    model, variables = small
    tokens = np.array([3, 10, 4, 11, 5, 6, 10] * 9, np.uint16)
    windows = Windows(make_windows(tokens, 7).store, 7, Digits(), {})
    for evaluate in (perplexity, by_position):
        with pytest.raises(ArgumentError, match="ids from 0 to 10, .* got 0 to 11; use the tok"):
            evaluate(model, variables, windows)
