"""Answers with a prefix cache equal those without, bit for bit."""

import dataclasses

import chex
import jax
import pytest

from tests.generate.conversations import BYTES, LETTERS, initialized, model_and_variables
from xlstm_jax.errors import ArgumentError
from xlstm_jax.generate import PrefixCache, Session, generate, prefill
from xlstm_jax.generate.prefix_cache import state_bytes
from xlstm_jax.modules import LM

WIDTHS = (16, 4)
TEXT = [*b"a system prompt, which every conversation has in common, then a question"]


@pytest.fixture(scope="module", autouse=True)
def narrow_passes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "WIDTHS", WIDTHS)
        yield


@pytest.fixture
def widths(monkeypatch):
    """The widths of all passes that are computed."""
    calls, prefill_chunk = [], prefill._donating_pass

    def recorded(*args):
        calls.append(args[2].shape[1])
        return prefill_chunk(*args)

    monkeypatch.setattr(prefill, "_donating_pass", recorded)
    return calls


def answer(prompt, cache=None):
    model, variables = model_and_variables()
    state = None
    if cache is not None:
        state, prompt = cache.prefill(model, variables, prompt)
    options = dict(max_new_tokens=6, sampler=LETTERS, key=jax.random.key(2))
    return generate(model, variables, [prompt], state=state, **options)


def test_answers_with_a_cache_are_bit_identical():
    cache = PrefixCache(10**9)
    for length in (1, 3, 4, 5, 16, 17, 20, 40, 41, 47, 64, 72, 40):
        # With the prefix in the cache or not, and with another end.
        for prompt in (TEXT[:length], TEXT[:length], TEXT[: length - 1] + [7]):
            expected, actual = answer(prompt), answer(prompt, cache)
            assert actual.tokens == expected.tokens
            chex.assert_trees_all_equal(actual.state, expected.state)


def test_known_passes_are_not_computed_again(widths):
    cache = PrefixCache(10**9)
    answer(TEXT[:40], cache)
    assert widths == [16, 16, 4, 4] and len(cache) == 3
    widths.clear()
    answer(TEXT[:36] + [1, 2, 3, 4], cache)
    assert widths == [4]
    widths.clear()
    answer(TEXT[:20] + TEXT[:20], cache)
    assert widths == [16, 4, 4]
    # A pass counts only with all tokens before it.
    for other in ([1, *TEXT[:39]], [1, *TEXT[1:40]]):
        widths.clear()
        answer(other, cache)
        assert widths == [16, 16, 4, 4]


def test_sessions_with_a_cache_are_bit_identical(widths):
    cache = PrefixCache(10**9)
    results = []
    for options in ({}, {"cache": cache}, {"cache": cache}):
        session = Session(*model_and_variables(), BYTES, **options)
        widths.clear()
        session.append(TEXT[:41])
        read = sum(widths)
        session.generate(9, sampler=LETTERS, key=jax.random.key(0))
        session.append(TEXT[:41])
        results.append((session.tokens, session._point.state, read))
    for tokens, state, _ in results[1:]:
        assert tokens == results[0][0]
        chex.assert_trees_all_equal(state, results[0][1])
    assert [read for *_, read in results] == [40, 40, 4]


def test_copies_share_the_cache_of_unprepared_parameters():
    session = Session(*initialized(), BYTES, cache=PrefixCache(10**9))
    (copy,) = session.fork(1)
    session.append(TEXT)
    copy.append(TEXT)
    chex.assert_trees_all_equal(copy._point.state, session._point.state)


def test_the_least_recently_used_states_are_dropped():
    size = state_bytes(model_and_variables()[0].init_state(1))
    cache = PrefixCache(3 * size)
    call = lambda *ids: cache.prefill(*model_and_variables(), [*ids] + [0] * 4)  # noqa: E731
    first, second, third = ([i] * 4 for i in (1, 2, 3))
    call(*first), call(*second), call(*third)
    call(*first)
    call(*[4] * 4)
    assert len(cache) == 3 and cache.num_bytes == 3 * size
    states = [cache._states[key] for key in cache._states]
    assert call(*first).state is states[1] and call(*third).state is states[0]
    assert all(call(*second).state is not state for state in states)
    small = PrefixCache(size - 1)
    small.prefill(*model_and_variables(), TEXT)
    assert len(small) == small.num_bytes == 0


def test_a_cache_belongs_to_one_model():
    cache, (model, variables) = PrefixCache(10**6), model_and_variables()
    cache.prefill(model, variables, TEXT)
    cache.prefill(model, dict(variables), TEXT)
    copies = jax.tree.map(lambda x: x + 0, variables)
    another = LM(dataclasses.replace(model.cfg, logit_soft_cap=20.0))
    for other in ((model, copies), (another, variables)):
        with pytest.raises(ArgumentError, match="make a PrefixCache for each model"):
            cache.prefill(*other, TEXT)


@pytest.mark.usefixtures("unchecked_types")
def test_invalid_arguments_are_refused():
    with pytest.raises(ArgumentError, match="max_bytes must be at least 0, got -1"):
        PrefixCache(-1)
    with pytest.raises(ArgumentError, match="max_bytes must be int, got 1.5"):
        PrefixCache(1.5)
    with pytest.raises(ArgumentError, match="prompt must be a list of at least one token"):
        PrefixCache(1).prefill(*model_and_variables(), [])
