"""Evaluation equals a direct computation from all logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generate.small import model_and_variables
from tests.modules import models
from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, Windows, load
from xlstm_jax.data.mixture import Mixture
from xlstm_jax.data.shards.store import ArrayTokens
from xlstm_jax.data.tokenizers import BaseTokenizer
from xlstm_jax.errors import ArgumentError
from xlstm_jax.evaluate import by_frequency, by_position, count_tokens, perplexity, position
from xlstm_jax.evaluate.segments import HostLosses
from xlstm_jax.modules import LM

SEQ_LEN = 21


class Letters(BaseTokenizer):
    """A tokenizer of ten digits; token 10 ends a document."""

    name, vocab_size, eos_id, sha256 = "letters", 11, 10, ""
    token_bytes = np.array([1] * 10 + [0], np.int32)

    def encode(self, text):
        text = text.decode() if isinstance(text, bytes) else text
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
    params=[
        "m",
        pytest.param("sMl", marks=pytest.mark.slow),
        pytest.param(models.MIXED_BASELINES, marks=pytest.mark.slow),
    ],
    ids=["m", "sMl", "baselines"],
)
def small(request):
    if request.param == "m":
        return model_and_variables("m")
    cfg = models.config(request.param)
    # A window: without one, the cache would limit the length of what is evaluated.
    cfg = dataclasses.replace(cfg, attention=dataclasses.replace(cfg.attention, window=5))
    return models.model_and_variables(cfg)


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


def test_segments_give_the_loss_of_their_windows(small, windows):
    """Segments of 4 split documents; each document starts from the initial state."""
    unsegmented = perplexity(*small, windows, batch_size=4)
    result = perplexity(*small, windows, batch_size=4, segment_len=4)
    assert result.num_tokens == unsegmented.num_tokens
    assert result.nats_per_token == pytest.approx(unsegmented.nats_per_token, rel=1e-5)


@pytest.mark.slow
def test_segments_carry_the_state_over_documents_without_resets(windows):
    small = model_and_variables("m")
    options = dict(batch_size=4, document_resets=False)
    unsegmented = perplexity(*small, windows, **options)
    result = perplexity(*small, windows, segment_len=4, **options)
    assert result.nats_per_token == pytest.approx(unsegmented.nats_per_token, rel=1e-5)
    with_resets = perplexity(*small, windows, batch_size=4)
    assert unsegmented.nats_per_token != pytest.approx(with_resets.nats_per_token, rel=1e-4)


def test_loss_by_position_equals_that_of_unsplit_windows(small, windows, losses):
    """Segments of 4 split buckets and documents; each document starts from the initial state."""
    nats, batch = losses
    buckets = by_position(*small, windows, batch_size=4, segment_len=4)
    assert [bucket[:2] for bucket in buckets] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 21)]
    for start, stop, mean, count in buckets:
        weights = batch.weights[:, start:stop]
        assert count == weights.sum()
        expected = (nats[:, start:stop] * weights).sum() / count
        assert mean == pytest.approx(expected, rel=1e-5)


def test_loss_by_frequency_equals_that_of_the_tokens_in_each_bucket(small, windows, losses):
    nats, batch = losses
    counts = np.array([0, 0, 1, 9, 10, 11, 99, 100, 500, 0, 7])
    buckets = by_frequency(*small, windows, counts=counts, edges=(0, 1, 10, 100), batch_size=4)
    assert [bucket[:2] for bucket in buckets] == [(0, 1), (1, 10), (10, 100), (100, None)]
    for start, stop, mean, num_tokens in buckets:
        of_id = (counts >= start) & (counts < (stop or np.inf))
        weights = batch.weights * of_id[batch.targets]
        assert num_tokens == weights.sum() > 0
        assert mean == pytest.approx((nats * weights).sum() / num_tokens, rel=1e-5)
    pooled = perplexity(*small, windows, batch_size=4)
    total = sum(bucket.nats_per_token * bucket.num_tokens for bucket in buckets)
    assert total / pooled.num_tokens == pytest.approx(pooled.nats_per_token, rel=1e-5)


def test_tokens_below_the_first_edge_form_a_bucket(small, windows):
    buckets = by_frequency(*small, windows, counts=[3] * 11, edges=(5,), batch_size=4)
    assert [(b.start, b.stop) for b in buckets] == [(0, 5), (5, None)]
    assert buckets[0].num_tokens and not buckets[1].num_tokens
    assert np.isnan(buckets[1].nats_per_token)


def test_counts_are_those_of_the_tokens_of_the_text(windows):
    tokens = windows.store.tokens
    assert count_tokens(windows, 12).tolist() == [int((tokens == i).sum()) for i in range(12)]
    mixture = Mixture({"a": windows, "b": windows})
    assert (count_tokens(mixture) == 2 * count_tokens(windows)).all()
    with pytest.raises(ArgumentError, match="vocab_size must be at least 11"):
        count_tokens(windows, 10)


@pytest.mark.slow
def test_counts_of_a_task_without_end_are_those_of_a_sample():
    counts = count_tokens(load(DataConfig(source="parity", seq_len=4, max_len=4), "train"))
    assert counts.tolist()[0] == 0 and counts.sum() == 256_000


@pytest.mark.parametrize("edges", [(), (1, 1), (5, 2), (-1, 3)])
def test_edges_that_do_not_increase_are_rejected(small, windows, edges):
    with pytest.raises(ArgumentError, match="edges must be increasing counts from 0 on"):
        by_frequency(*small, windows, counts=[1] * 11, edges=edges)


def test_counts_for_fewer_ids_than_the_data_have_are_rejected(small, windows):
    with pytest.raises(ArgumentError, match="counts must be integers for 11 token ids"):
        by_frequency(*small, windows, counts=[1] * 10)


def test_windows_beyond_the_attention_cache_are_rejected(windows):
    cfg = models.config("a")
    with pytest.raises(ArgumentError, match=r"at most model.attention.cache_size=7, .* got 21"):
        perplexity(LM(cfg), {"params": {}}, windows)


@pytest.mark.parametrize(
    ("seq_len", "buckets"),
    [(1, [(0, 1)]), (2, [(0, 1), (1, 2)]), (8, [(0, 1), (1, 2), (2, 4), (4, 8)])],
    ids="T{}".format,
)
def test_buckets_are_powers_of_two_up_to_the_window(seq_len, buckets, monkeypatch):
    def no_losses(model, params, batch, segment_len, **_):
        return HostLosses(np.zeros(batch.inputs.shape), np.zeros(batch.inputs.shape, bool))

    monkeypatch.setattr(position, "losses_of_positions", no_losses)
    windows = make_windows(np.array([3, 4, 5, 6, 7, 8, 9, 1, 10], np.uint16), seq_len)
    result = by_position(*model_and_variables("m"), windows)
    assert [bucket[:2] for bucket in result] == buckets


@pytest.mark.parametrize("measure", [perplexity, by_position])
def test_segments_of_no_tokens_are_rejected(small, windows, measure):
    with pytest.raises(ConfigError, match="segment_len must be at least 1, got 0"):
        measure(*small, windows, segment_len=0)


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
