"""Filters exclude exactly the tokens they should; samplers draw from the others."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.errors import ArgumentError
from xlstm_jax.generate import Sampler, greedy
from xlstm_jax.generate.sampling import min_p, repetition_penalty, temperature, top_k, top_p

PROBABILITIES = np.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]], np.float32)


@pytest.fixture
def logits():
    return jnp.log(PROBABILITIES)


def retained(logits):
    return np.isfinite(np.asarray(logits)).tolist()


def test_temperature_is_a_power_of_the_probabilities(logits):
    actual = jax.nn.softmax(temperature(logits, 0.5), axis=-1)
    expected = PROBABILITIES**2 / (PROBABILITIES**2).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_top_k_keeps_the_logits_of_the_k_most_likely_tokens(logits):
    filtered = top_k(logits, 2)
    assert retained(filtered) == [[True, True, False, False], [False, False, True, True]]
    np.testing.assert_array_equal(filtered[0, :2], logits[0, :2])


def test_top_k_beyond_the_vocabulary_keeps_everything(logits):
    np.testing.assert_array_equal(top_k(logits, 100), logits)


@pytest.mark.parametrize(
    ("p", "counts"), [(1e-6, [1, 1]), (0.45, [1, 2]), (0.74, [2, 3]), (0.89, [3, 3]), (1.0, [4, 4])]
)
def test_top_p_keeps_the_fewest_tokens_with_total_probability_p(logits, p, counts):
    filtered = np.asarray(top_p(logits, p))
    assert np.isfinite(filtered).sum(axis=-1).tolist() == counts
    for i, count in enumerate(counts):
        most_likely = np.argsort(-PROBABILITIES[i])[:count]
        assert np.isfinite(filtered[i, most_likely]).all()


def test_min_p_keeps_tokens_by_their_ratio_to_the_largest_probability(logits):
    assert retained(min_p(logits, 0.4)) == [[True, True, False, False], [False, True, True, True]]
    assert retained(min_p(logits, 1.0)) == [
        [True, False, False, False],
        [False, False, False, True],
    ]


def test_repetition_penalty_lowers_only_logits_of_seen_tokens_of_either_sign():
    logits = jnp.array([2.0, -2.0, 2.0, -2.0])
    seen = jnp.array([True, True, False, False])
    penalized = repetition_penalty(logits, seen, 2.0)
    np.testing.assert_array_equal(penalized, jnp.array([1.0, -4.0, 2.0, -2.0]))


def test_filters_compose(logits):
    filtered = top_p(top_k(temperature(logits, 0.7), 3), 0.6)
    assert retained(filtered)[0] == [True, False, False, False]


def test_greedy_takes_the_most_likely_token(logits):
    assert greedy(logits).tolist() == [0, 3]


def test_sampler_draws_with_the_probabilities_after_filtering(logits, key):
    sampler = Sampler(top_k=2)
    draws = jax.vmap(lambda k: sampler(logits[0], k, jnp.zeros(4, bool)))(
        jax.random.split(key, 4096)
    )
    frequencies = np.bincount(draws, minlength=4) / 4096
    np.testing.assert_allclose(frequencies, [2 / 3, 1 / 3, 0, 0], atol=0.03)


def test_every_field_of_a_sampler_has_an_effect(logits, key):
    """Each setting leaves a single token, so that a field without effect fails."""
    seen = jnp.array([True, False, False, False])
    for sampler, token in (
        (Sampler(temperature=1e-3), 0),
        (Sampler(top_k=1), 0),
        (Sampler(top_p=0.3), 0),
        (Sampler(min_p=0.9), 0),
        (Sampler(repetition_penalty=10.0, temperature=1e-3), 1),
    ):
        draws = jax.vmap(lambda k, s=sampler: s(logits[0], k, seen))(jax.random.split(key, 64))
        assert set(draws.tolist()) == {token}


def test_samplers_with_equal_fields_are_equal():
    assert Sampler(top_k=3) == Sampler(top_k=3)
    assert hash(Sampler(top_k=3)) == hash(Sampler(top_k=3))


INVALID = {
    "temperature": (0.0, -1.0, math.nan, math.inf, 1e-46, 1e-30, 1e30, "1", True),
    "repetition_penalty": (0.0, math.inf, 1e-30),
    "top_k": (0, -1, 1.5, 10**20),
    "top_p": (0.0, 1.1, math.nan, 1e-46),
    "min_p": (-0.1, math.inf),
    "never": ((-1,), (1.5,), 3),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", INVALID)
def test_field_out_of_range_is_rejected(name):
    for value in INVALID[name]:
        with pytest.raises(ConfigError, match=rf"^{name}(\[0\])? must be .*got \S+"):
            Sampler(**{name: value})


def test_excluded_tokens_must_be_in_the_vocabulary(logits, key):
    with pytest.raises(ArgumentError, match="never must have token ids below 4, .* got 4; drop"):
        Sampler(never=(4,))(logits[0], key, jnp.zeros(4, bool))
