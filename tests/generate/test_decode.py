"""Generation matches full forward passes for any batch, prefill chunk and stream piece."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generate.small import model_and_variables
from xlstm_jax.config import ConfigError
from xlstm_jax.errors import ArgumentError
from xlstm_jax.generate import Sampler, generate, greedy, prefill, stream

PROMPTS = [[1], [5, 4, 3, 2, 1, 0, 7], list(range(11)) * 3, [9, 9]]
RANDOM = Sampler(temperature=2.0, repetition_penalty=1.3)


@pytest.fixture(scope="module", autouse=True)
def single_prefill_width():
    """One prefill width suffices for most tests, and every width costs a compilation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "WIDTHS", (64,))
        yield


@pytest.fixture(scope="module")
def small():
    return model_and_variables()


@pytest.fixture(scope="module")
def generated(small):
    return generate(*small, PROMPTS, max_new_tokens=8)


def naive_greedy(small, prompt, count):
    """Greedy decoding with a pass over the full sequence for every token, without a state."""
    model, variables = small
    apply = jax.jit(model.apply)
    sequence = list(prompt)
    for _ in range(count):
        # Right padding does not affect a causal model; with one length it compiles once.
        tokens = np.array([sequence + [0] * (64 - len(sequence))], np.int32)
        logits = apply(variables, tokens)[0]
        sequence.append(int(jnp.argmax(logits[0, len(sequence) - 1])))
    return sequence[len(prompt) :]


def test_prefill_and_decode_match_full_passes(small, generated):
    for i in (0, 2):
        assert generated.tokens[i] == naive_greedy(small, PROMPTS[i], 8)


def state_of(state, i):
    """The state of sequence i."""
    return jax.tree.map(lambda leaf: leaf[:, i], state)


@pytest.mark.parametrize(
    "sampler", [pytest.param(greedy, marks=pytest.mark.slow), RANDOM], ids=["greedy", "random"]
)
def test_result_does_not_depend_on_the_other_prompts(small, key, sampler):
    batch = generate(*small, PROMPTS, max_new_tokens=8, sampler=sampler, key=key)
    for i in (1, 2):
        key_i = jax.random.fold_in(key, i)[None]
        single = generate(*small, [PROMPTS[i]], max_new_tokens=8, sampler=sampler, key=key_i)
        assert single.tokens == [batch.tokens[i]]
        states = state_of(single.state, 0), state_of(batch.state, i)
        chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-5)


def test_resuming_from_a_state_matches_a_single_call(small):
    first = generate(*small, PROMPTS, max_new_tokens=5)
    next_prompts = [[6, 7, 8], [0], [3] * 20, [1, 2]]
    second = generate(*small, next_prompts, max_new_tokens=5, state=first.state)
    joined = [sum(parts, []) for parts in zip(PROMPTS, first.tokens, next_prompts, strict=True)]
    assert second.tokens == generate(*small, joined, max_new_tokens=5).tokens


def test_state_matches_a_pass_over_prompt_and_generated_tokens(small, generated):
    model, variables = small
    tokens = jnp.array([PROMPTS[2] + generated.tokens[2]])
    _, state = jax.jit(model.apply)(variables, tokens)
    states = state_of(generated.state, 2), state_of(state, 0)
    chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-5)


def test_result_does_not_depend_on_prefill_chunks(small, generated, monkeypatch):
    monkeypatch.setattr(prefill, "WIDTHS", (8,))
    assert generate(*small, PROMPTS, max_new_tokens=8).tokens == generated.tokens


@pytest.mark.slow
def test_prompts_of_equal_length_may_be_an_array(small):
    expected = generate(*small, [[1, 2, 3], [4, 5, 6]], max_new_tokens=2).tokens
    for prompts in (
        np.array([[1, 2, 3], [4, 5, 6]]),
        jnp.array([[1, 2, 3], [4, 5, 6]]),
        ((1, 2, 3), (4, 5, 6)),
        [np.array([1, 2, 3], np.uint16), [4, 5, 6]],
    ):
        assert generate(*small, prompts, max_new_tokens=2).tokens == expected


@pytest.mark.parametrize(
    "length, widths",
    [(24, [16, 4, 4]), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, [4]), (9, [16])))],
)
def test_prompts_of_any_length_share_few_prefill_programs(small, monkeypatch, length, widths):
    """The state equals that of an unpadded pass."""
    model, variables = small
    calls, run_pass = [], prefill._donating_pass

    def recorded(*args):
        calls.append(args[2].shape[1])
        return run_pass(*args)

    monkeypatch.setattr(prefill, "WIDTHS", (16, 4))
    monkeypatch.setattr(prefill, "_donating_pass", recorded)
    prompt = [n % 11 for n in range(length)]
    result = generate(model, variables, [prompt], max_new_tokens=0)
    assert calls == widths
    _, state = jax.jit(model.apply)(variables, jnp.array([prompt]))
    chex.assert_trees_all_close(result.state, state, rtol=1e-4, atol=1e-5)


def test_stop_token_ends_a_sequence_and_freezes_its_state(small, generated):
    stop = generated.tokens[1][2]
    stopped = generate(*small, PROMPTS, max_new_tokens=8, stop=[stop] * 11)
    for actual, full in zip(stopped.tokens, generated.tokens, strict=True):
        assert actual == (full[: full.index(stop) + 1] if stop in full else full)
    first = len(stopped.tokens[1])
    assert first < 8
    short = next(stream(*small, PROMPTS, max_new_tokens=first, piece=8))
    chex.assert_trees_all_equal(state_of(stopped.state, 1), state_of(short.state, 1))


def test_loop_ends_when_all_sequences_have_stopped(small):
    pieces = list(
        stream(*small, PROMPTS, max_new_tokens=10_000, piece=8, stop=range(small[0].cfg.vocab_size))
    )
    assert [[len(ids) for ids in piece.tokens] for piece in pieces] == [[1, 1, 1, 1]]


@pytest.mark.parametrize("sampler", [greedy, RANDOM], ids=["greedy", "random"])
def test_streamed_pieces_join_to_the_generated_tokens(small, key, sampler):
    options = dict(max_new_tokens=8, sampler=sampler, key=key)
    pieces = list(stream(*small, PROMPTS, piece=5, **options))
    assert [len(piece.tokens[0]) for piece in pieces] == [5, 3]
    joined = [sum(parts, []) for parts in zip(*(p.tokens for p in pieces), strict=True)]
    assert joined == generate(*small, PROMPTS, **options).tokens


def test_max_new_tokens_0_only_prefills(small):
    prefilled = generate(*small, PROMPTS, max_new_tokens=0)
    assert prefilled.tokens == [[], [], [], []]
    resumed = generate(*small, [[4]] * 4, max_new_tokens=5, state=prefilled.state)
    expected = generate(*small, [p + [4] for p in PROMPTS], max_new_tokens=5)
    assert resumed.tokens == expected.tokens


def test_equal_prompts_get_different_samples_and_a_key_reproduces_them(small, key):
    options = dict(max_new_tokens=8, sampler=RANDOM, key=key)
    samples = generate(*small, [[1, 2]] * 4, **options).tokens
    assert len(set(map(tuple, samples))) == 4
    assert generate(*small, [[1, 2]] * 4, **options).tokens == samples
    options["key"] = jax.random.PRNGKey(0)  # a legacy key with the same seed
    assert generate(*small, [[1, 2]] * 4, **options).tokens == samples


def unseen(logits, key, seen):
    """The most likely token not seen yet."""
    return greedy(jnp.where(seen, -jnp.inf, logits))


def test_custom_sampler_gets_seen_tokens_and_is_traced_once(small, key):
    """Calls with different prompt lengths and `max_new_tokens` share one trace."""
    options = dict(sampler=chex.assert_max_traces(unseen, n=1), key=key)
    prompts = [[1, 2, 3], [4, 4, 4], [5] * 9, [10, 0]]
    generate(*small, [[1]] * 4, max_new_tokens=6, **options)
    samples = generate(*small, prompts, max_new_tokens=8, **options).tokens
    counts = [len({*prompt, *ids}) for prompt, ids in zip(prompts, samples, strict=True)]
    assert counts == [11, 9, 9, 10]


INVALID = {
    "no prompt": (dict(prompts=[]), "prompts must have at least one list"),
    "empty prompt": (dict(prompts=[[1], []]), r"prompts\[1\] must be a list of at least one token"),
    "token too large": (dict(prompts=[[1, 11]]), r"ids from 0 to 10, got 11 at position 1"),
    "token below 0": (dict(prompts=[[-1]]), r"token ids from 0 to 10, got -1 at position 0"),
    "large token": (dict(prompts=[[2**63]]), r"token ids from 0 to 10, got 9223372036854775808 at"),
    "array of tokens": (dict(prompts=np.full((2, 3), 11)), r"prompts\[0\] must have .*, got 11"),
    "huge token": (dict(prompts=[[10**30]]), r"prompts\[0\] must be a list of at least one token"),
    "floats": (dict(prompts=[[1.0]]), r"prompts\[0\] must be a list .* integers, got \[1.0\]"),
    "nested": (dict(prompts=[[[1], [2, 3]]]), r"prompts\[0\] must be a list"),
    "one prompt": (dict(prompts=[1, 2]), r"prompts\[0\] must be a list .* integers, got 1;"),
    "text": (dict(prompts="ab"), r"prompts\[0\] must be a list .* integers, got 'a';"),
    "negative count": (dict(max_new_tokens=-1), "max_new_tokens must be at least 0"),
    "huge count": (dict(max_new_tokens=10**20), "max_new_tokens must be at most 2147483647, got"),
    "fraction": (dict(max_new_tokens=1.5), "max_new_tokens must be int, got 1.5"),
    "text as stop": (dict(stop=["a"]), "stop must be a list of at least one token id"),
    "huge stop": (dict(stop=[10**10]), "stop must have token ids from 0 to 2147483646, got"),
    "no key": (dict(sampler=Sampler()), "key must be a PRNG key"),
    "sampler": (dict(sampler=3, key=1), "sampler must be a hashable function .*, got 3; use"),
    "unhashable": (dict(sampler=[], key=1), r"sampler must be a hashable .*, got \[\]; use"),
    "never": (dict(sampler=Sampler(never=(11,)), key=1), "never must have token ids below 11"),
    "too many keys": (dict(key=3), r"single key or have the shape \(1,\), got"),
    "state of two": (dict(state=2), "must be that of pattern='ms' and 1 sequences: leaf 'm/conv'"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("case", INVALID)
def test_invalid_arguments_are_rejected(small, key, case):
    change, message = INVALID[case]
    arguments = dict(prompts=[[1]], max_new_tokens=1) | change
    if "key" in change:
        arguments["key"] = jax.random.split(key, change["key"])
    if "state" in change:
        arguments["state"] = small[0].init_state(change["state"])
    with pytest.raises(ArgumentError, match=message):
        generate(*small, **arguments)


def test_piece_0_is_rejected_before_prefill(small):
    with pytest.raises(ConfigError, match="piece must be at least 1"):
        stream(*small, [[1]], max_new_tokens=5, piece=0)
