"""Scores of sequences, continuations and documents equal those of the logits of each text alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluate.test_perplexity import Digits, Letters
from tests.generate.small import model_and_variables
from tests.modules import models
from xlstm_jax.errors import ArgumentError, ConfigError
from xlstm_jax.evaluate import Domain, by_domain, domains, score_continuations, scoring, wins
from xlstm_jax.evaluate.scoring import TokenSequence, score_sequences, windows_of_document
from xlstm_jax.generate import generate
from xlstm_jax.modules import LM

TOKENIZER = Letters()


@pytest.fixture(scope="module")
def small():
    return model_and_variables("m")


@pytest.fixture(scope="module")
def log_probs(small):
    """The log-probabilities of the token after each prefix of a text, of 40 tokens at most."""
    model, variables = small
    apply = jax.jit(model.apply)

    def compute(tokens):
        padded = jnp.zeros((1, 40), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
        return np.asarray(jax.nn.log_softmax(apply(variables, padded)[0][0]), np.float64)

    return compute


def expected(log_probs, sequence):
    picked = log_probs(sequence.tokens)[np.arange(len(sequence.tokens) - 1), sequence.tokens[1:]]
    return picked[len(picked) - sequence.num_scored :].sum()


def random_sequences(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [TokenSequence(rng.integers(0, 11, n), int(rng.integers(0, n))) for n in lengths]


@pytest.mark.parametrize("batch_size", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_scores_do_not_depend_on_the_other_sequences(small, log_probs, batch_size, monkeypatch):
    """Of any lengths, in the order given, also where they are longer than a segment."""
    monkeypatch.setattr(scoring, "SEGMENT", 16)
    monkeypatch.setattr(scoring, "MIN_WIDTH", 16)
    given = random_sequences([2, 40, 17, 9, 33, 3, 18])
    scores = score_sequences(*small, given, batch_size=batch_size)
    for sequence, score in zip(given, scores, strict=True):
        assert score.logprob == pytest.approx(expected(log_probs, sequence), rel=1e-5, abs=1e-6)
        best = log_probs(sequence.tokens).argmax(axis=-1)[: len(sequence.tokens) - 1]
        scored = slice(len(best) - sequence.num_scored, None)
        assert score.is_greedy == (best[scored] == sequence.tokens[1:][scored]).all()


def test_batches_have_few_widths():
    widths = {scoring._width(n) for n in range(1, 1025)}
    assert widths == {32, 64, 128, 256, 512, 1024}
    assert scoring._width(1025) == 2048


def test_the_last_window_of_a_document_is_filled_up_with_preceding_tokens():
    tokens = np.arange(5)
    first, second = windows_of_document(tokens, prefix=9, window=4)
    assert (first.tokens.tolist(), first.num_scored) == ([9, 0, 1, 2, 3], 4)
    assert (second.tokens.tolist(), second.num_scored) == ([0, 1, 2, 3, 4], 1)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("window", [1, 4, None])
def test_windows_score_every_token_once(length, window):
    tokens = np.arange(length)
    scored = [
        s.tokens[len(s.tokens) - s.num_scored :] for s in windows_of_document(tokens, 99, window)
    ]
    assert np.concatenate([*scored, []]).tolist() == tokens.tolist()
    assert all(
        len(s.tokens) <= (window or length) + 1 for s in windows_of_document(tokens, 99, window)
    )


def test_the_log_probability_of_a_continuation_is_the_sum_of_single_steps(small):
    scores = score_continuations(*small, TOKENIZER, "314", ["159", "2", "65358"], batch_size=1)
    steps = 0.0
    for n in range(3):
        steps += score_continuations(
            *small, TOKENIZER, "314" + "159"[:n], ["159"[n]], batch_size=1
        )[0].logprob
    assert scores[0].logprob == pytest.approx(steps, rel=1e-5)
    assert [s.num_tokens for s in scores] == [s.num_bytes for s in scores] == [3, 1, 5]


@pytest.mark.slow
def test_a_continuation_is_greedy_if_greedy_decoding_yields_it(small):
    ids = generate(*small, [TOKENIZER.encode("271")], max_new_tokens=3).tokens[0]
    text = "".join(map(str, ids))
    others = [text[:-1] + str((int(text[-1]) + 1) % 10), text]
    flags = [s.is_greedy for s in score_continuations(*small, TOKENIZER, "271", others)]
    assert flags == [False, True]


@pytest.mark.slow
def test_the_normalized_choice_differs_from_the_raw_one(small):
    """A long likely continuation loses to a short one in total, and wins per byte."""
    ids = generate(*small, [TOKENIZER.encode("27")], max_new_tokens=12).tokens[0]
    long = "".join(str(i) for i in ids if i < 10)
    choices = [long, *"0123456789"]
    scores = score_continuations(*small, TOKENIZER, "27", choices)
    raw = max(range(11), key=lambda i: scores[i].logprob)
    worst = min(range(1, 11), key=lambda i: scores[i].logprob)
    pair = [scores[0], scores[worst]]
    normalized = [s.logprob / s.num_bytes for s in pair]
    assert raw != 0 and normalized[0] > normalized[1]


def test_a_text_without_context_follows_the_end_of_a_document(small, log_probs):
    score = score_continuations(*small, TOKENIZER, "", ["12"], batch_size=1)[0]
    assert score.logprob == pytest.approx(
        expected(log_probs, TokenSequence(np.array([10, 1, 2]), 2))
    )


@pytest.mark.parametrize("continuations", ["12", ["1", ""]])
def test_continuations_must_be_texts_that_are_not_empty(small, continuations):
    with pytest.raises(ArgumentError, match="continuations must be a list of texts"):
        score_continuations(*small, TOKENIZER, "3", continuations)


def test_sequences_that_the_model_cannot_score_are_rejected(small):
    with pytest.raises(ArgumentError, match="ids must be from 0 to 10, .* got 3 to 11"):
        score_sequences(*small, [TokenSequence(np.array([3, 11]), 1)])
    with pytest.raises(ArgumentError, match="at least one token of context, got 2 tokens, of wh"):
        score_sequences(*small, [TokenSequence(np.array([3, 4]), 2)])
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        score_sequences(*small, [], batch_size=0)
    with pytest.raises(ArgumentError, match="at most model.attention.cache_size=7, .* got 8"):
        score_sequences(LM(models.config("a")), {}, [TokenSequence(np.arange(9), 1)])


@pytest.fixture
def folder(tmp_path):
    """Domains: a folder of two documents, a file with a document, and one of records."""
    (tmp_path / "news" / "deep").mkdir(parents=True)
    (tmp_path / "news" / "a.txt").write_text("31415926")
    (tmp_path / "news" / "deep" / "b.txt").write_text("27")
    (tmp_path / "books.v2.txt").write_text("1414213562")
    (tmp_path / "numbers.jsonl").write_text('{"text": "1"}\n{"text": "23"}\n')
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_the_loss_of_a_domain_is_that_of_all_tokens_of_its_documents(small, log_probs, folder):
    results = by_domain(*small, TOKENIZER, folder, seq_len=4, batch_size=1)
    assert sorted(results) == ["books.v2", "news", "numbers"]
    documents = {"news": ["31415926", "27"], "books.v2": ["1414213562"], "numbers": ["1", "23"]}
    for name, texts in documents.items():
        nats = 0.0
        for text in texts:
            for window in windows_of_document(TOKENIZER.encode(text), 10, 4):
                nats -= expected(log_probs, window)
        size = sum(map(len, texts))
        assert results[name].num_tokens == results[name].num_bytes == size
        assert results[name].num_documents == len(texts)
        assert results[name].nats_per_token == pytest.approx(nats / size, rel=1e-5)
        assert results[name].bits_per_byte == pytest.approx(nats / size / math.log(2), rel=1e-5)
    mean = domains.mean_loss(results)
    assert mean.num_documents == 5 and mean.num_tokens == 23
    total = sum(d.nats_per_token * d.num_tokens for d in results.values())
    assert mean.nats_per_token == pytest.approx(total / 23)


def test_domains_without_text_are_rejected_before_any_is_evaluated(small, folder):
    missing = ("must be a folder, got .*nowhere, which does not exist", folder / "nowhere")
    (folder / "empty").mkdir()
    alone = folder / ".alone"
    alone.mkdir()
    for message, path in (
        ("domain 'empty' of .* must have files with text, but has none", folder),
        ("must have one subfolder or file per domain, but it is empty", alone),
        ("must be a folder, got .*, which is a file", folder / "numbers.jsonl"),
        missing,
    ):
        with pytest.raises(ConfigError, match=message):
            by_domain(LM(models.config("m")), {}, TOKENIZER, path)


def test_domains_are_not_evaluated_with_the_tokenizer_of_another_model(small, folder):
    with pytest.raises(ArgumentError, match="tokenizer must have at most 11 ids"):
        by_domain(*small, Digits(), folder)
    with pytest.raises(ConfigError, match="seq_len must be at least 1, got 0"):
        by_domain(*small, TOKENIZER, folder, seq_len=0)


def test_wins_count_the_domains_with_fewer_bits_per_byte():
    def result(**bits):
        # Of another tokenizer: nats per token do not compare.
        return {n: Domain(value * 9, value, 3, 9, 1) for n, value in bits.items()}

    a, b = result(x=1.0, y=2.0, z=3.0), result(x=1.5, y=2.0, z=3.5)
    assert wins(a, b) == (2, 1, 3)
    assert wins(b, a) == (0, 1, 3)
    for other in (result(x=1.0), {**b, "x": b["x"]._replace(num_bytes=8)}):
        with pytest.raises(ArgumentError, match="must have the same domains, but they differ in"):
            wins(a, other)
