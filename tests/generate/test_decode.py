"""Answers are those of the model read token by token, in any company, in any pieces."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generate.small import model_and_variables
from xlstm_jax.config import ConfigError
from xlstm_jax.generate import Sampler, decode, generate, greedy, stream

PROMPTS = [[1], [5, 4, 3, 2, 1, 0, 7], list(range(11)) * 3, [9, 9]]
RANDOM = Sampler(temperature=2.0, repetition_penalty=1.3)


@pytest.fixture(scope="module", autouse=True)
def one_width_of_prefill():
    """Every width costs a compile; one is the least that most tests need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "MIN_PREFILL", 64)
        yield


@pytest.fixture(scope="module")
def small():
    return model_and_variables()


@pytest.fixture(scope="module")
def answers(small):
    return generate(*small, PROMPTS, max_new_tokens=8)


def continuation(small, prompt, count):
    """The greedy answer by one whole pass over the text per token: no state, no padding."""
    model, variables = small
    apply = jax.jit(model.apply)
    text = list(prompt)
    for _ in range(count):
        # Tokens to the right cannot matter to a causal model, and one length compiles once.
        tokens = np.array([text + [0] * (64 - len(text))], np.int32)
        logits = apply(variables, tokens)[0]
        text.append(int(jnp.argmax(logits[0, len(text) - 1])))
    return text[len(prompt) :]


def test_prefill_and_decode_equal_one_pass_over_the_text(small, answers):
    for row in (0, 2):
        assert answers.tokens[row] == continuation(small, PROMPTS[row], 8)


def of_row(state, row):
    return jax.tree.map(lambda leaf: leaf[:, row], state)


@pytest.mark.parametrize(
    "sampler", [pytest.param(greedy, marks=pytest.mark.slow), RANDOM], ids=["greedy", "random"]
)
def test_a_row_is_answered_as_it_would_be_alone(small, key, sampler):
    together = generate(*small, PROMPTS, max_new_tokens=8, sampler=sampler, key=key)
    for row in (1, 2):
        own = jax.random.fold_in(key, row)[None]
        alone = generate(*small, [PROMPTS[row]], max_new_tokens=8, sampler=sampler, key=own)
        assert alone.tokens == [together.tokens[row]]
        states = of_row(alone.state, 0), of_row(together.state, row)
        chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-5)


def test_an_answer_continued_from_its_state_equals_one_go(small, answers):
    first = generate(*small, PROMPTS, max_new_tokens=5)
    more = [[6, 7, 8], [0], [3] * 20, [1, 2]]
    second = generate(*small, more, max_new_tokens=5, state=first.state)
    texts = [p + a + m for p, a, m in zip(PROMPTS, first.tokens, more, strict=True)]
    assert second.tokens == generate(*small, texts, max_new_tokens=5).tokens


def test_the_state_is_the_models_own_after_reading_prompt_and_answer(small, answers):
    model, variables = small
    tokens = jnp.array([PROMPTS[2] + answers.tokens[2]])
    _, state = jax.jit(model.apply)(variables, tokens)
    states = of_row(answers.state, 2), of_row(state, 0)
    chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-5)


def test_a_prompt_read_in_many_pieces_gets_the_same_answer(small, answers, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PREFILL", 8)
    monkeypatch.setattr(decode, "MIN_PREFILL", 8)
    assert generate(*small, PROMPTS, max_new_tokens=8).tokens == answers.tokens


def test_a_row_ends_with_its_stop_token_and_its_state_stands_still(small, answers):
    stop = answers.tokens[1][2]
    stopped = generate(*small, PROMPTS, max_new_tokens=8, stop=[stop] * 11)
    for cut, whole in zip(stopped.tokens, answers.tokens, strict=True):
        assert cut == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    first = len(stopped.tokens[1])
    assert first < 8
    short = next(stream(*small, PROMPTS, max_new_tokens=first, piece=8))
    chex.assert_trees_all_equal(of_row(stopped.state, 1), of_row(short.state, 1))


def test_the_loop_ends_when_every_row_has_stopped(small):
    pieces = list(
        stream(*small, PROMPTS, max_new_tokens=10_000, piece=8, stop=range(small[0].cfg.vocab_size))
    )
    assert [[len(row) for row in piece.tokens] for piece in pieces] == [[1, 1, 1, 1]]


@pytest.mark.parametrize("sampler", [greedy, RANDOM], ids=["greedy", "random"])
def test_a_stream_is_the_answer_in_pieces(small, key, sampler):
    options = dict(max_new_tokens=8, sampler=sampler, key=key)
    pieces = list(stream(*small, PROMPTS, piece=5, **options))
    assert [len(piece.tokens[0]) for piece in pieces] == [5, 3]
    joined = [sum(parts, []) for parts in zip(*(p.tokens for p in pieces), strict=True)]
    assert joined == generate(*small, PROMPTS, **options).tokens


def test_no_new_tokens_means_reading_the_prompt(small):
    read = generate(*small, PROMPTS, max_new_tokens=0)
    assert read.tokens == [[], [], [], []]
    texts = [[4]] * 4
    more = generate(*small, texts, max_new_tokens=5, state=read.state)
    whole = generate(*small, [p + [4] for p in PROMPTS], max_new_tokens=5)
    assert more.tokens == whole.tokens


def test_equal_prompts_draw_different_answers_and_a_key_repeats_them(small, key):
    options = dict(max_new_tokens=8, sampler=RANDOM, key=key)
    drawn = generate(*small, [[1, 2]] * 4, **options).tokens
    assert len(set(map(tuple, drawn))) == 4
    assert generate(*small, [[1, 2]] * 4, **options).tokens == drawn
    options["key"] = jax.random.PRNGKey(0)  # of the older kind, with the same seed
    assert generate(*small, [[1, 2]] * 4, **options).tokens == drawn


def unseen(logits, key, seen):
    """The likeliest token that has not occurred."""
    return greedy(jnp.where(seen, -jnp.inf, logits))


def test_a_sampler_of_ones_own_sees_which_tokens_occurred_and_is_traced_once(small, key):
    """Whatever the lengths of prompts and answers: a second trace would be an error."""
    options = dict(sampler=chex.assert_max_traces(unseen, n=1), key=key)
    prompts = [[1, 2, 3], [4, 4, 4], [5] * 9, [10, 0]]
    generate(*small, [[1]] * 4, max_new_tokens=6, **options)
    drawn = generate(*small, prompts, max_new_tokens=8, **options).tokens
    counts = [len({*prompt, *answer}) for prompt, answer in zip(prompts, drawn, strict=True)]
    assert counts == [11, 9, 9, 10]


BAD = {
    "no prompt": (dict(prompts=[]), "prompts must hold at least one list"),
    "empty prompt": (dict(prompts=[[1], []]), r"prompts\[1\] must hold at least one token"),
    "token too large": (dict(prompts=[[1, 11]]), r"token ids in 0..10, got 1 to 11"),
    "token below 0": (dict(prompts=[[-1]]), r"token ids in 0..10, got -1"),
    "negative count": (dict(max_new_tokens=-1), "max_new_tokens must be at least 0"),
    "no key": (dict(sampler=Sampler()), "key must be given"),
    "too many keys": (dict(key=3), "one for each of 1 prompts, got"),
    "state of two": (dict(state=2), "state of this model for 1 prompts"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_in_one_sentence(small, key, case):
    change, sentence = BAD[case]
    arguments = dict(prompts=[[1]], max_new_tokens=1) | change
    if "key" in change:
        arguments["key"] = jax.random.split(key, change["key"])
    if "state" in change:
        arguments["state"] = small[0].init_state(change["state"])
    with pytest.raises(ConfigError, match=sentence):
        generate(*small, **arguments)


def test_pieces_of_nothing_are_refused_before_anything_is_read(small):
    with pytest.raises(ConfigError, match="piece at least 1"):
        stream(*small, [[1]], max_new_tokens=5, piece=0)
