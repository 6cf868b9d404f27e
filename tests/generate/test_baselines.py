"""Generation with every baseline; the tests share the shapes, and so the programs, of a model."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules.models import BASELINES, MIXED_BASELINES, config
from xlstm_jax.generate import generate, prefill
from xlstm_jax.modules import LM

PROMPTS = [[5, 4, 3, 2, 1, 0, 7], [9]]
MORE = [[6], [3] * 9]
COUNT = 4

# Caches of attention are shorter than the longest sequence.
each_pattern = pytest.mark.parametrize(
    "pattern",
    ["w", *(pytest.param(p, marks=pytest.mark.slow) for p in (MIXED_BASELINES, *BASELINES))],
)


@pytest.fixture(scope="module", autouse=True)
def single_prefill_width():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "WIDTHS", (32,))
        yield


@functools.cache
def model_and_variables(pattern: str):
    model = LM(config(pattern, embedding_std=1.0, head_std=1.0))
    return model, jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))


def continued(pattern, prompts, state=None):
    return generate(*model_and_variables(pattern), prompts, max_new_tokens=COUNT, state=state)


def state_of(state, i):
    """The state of sequence i."""
    return jax.tree.map(lambda leaf: leaf[:, i], state)


@each_pattern
def test_result_does_not_depend_on_the_other_prompts(pattern):
    batch = continued(pattern, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        other = continued(pattern, [prompt, MORE[1]])
        assert other.tokens[0] == batch.tokens[i]
        chex.assert_trees_all_equal(state_of(other.state, 0), state_of(batch.state, i))


@each_pattern
def test_resuming_from_a_state_equals_a_single_call(pattern):
    first = continued(pattern, PROMPTS)
    second = continued(pattern, MORE, first.state)
    joined = [sum(parts, []) for parts in zip(PROMPTS, first.tokens, MORE, strict=True)]
    expected = continued(pattern, joined)
    assert second.tokens == expected.tokens
    chex.assert_trees_all_close(second.state, expected.state, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [MIXED_BASELINES, *BASELINES])
def test_generated_tokens_are_those_of_full_passes(pattern):
    model, variables = model_and_variables(pattern)
    apply, sequence = jax.jit(model.apply), list(PROMPTS[0])
    for _ in range(COUNT):
        padded = np.array([sequence + [0] * (16 - len(sequence))], np.int32)
        logits = apply(variables, padded)[0]
        sequence.append(int(jnp.argmax(logits[0, len(sequence) - 1])))
    assert continued(pattern, PROMPTS).tokens[0] == sequence[len(PROMPTS[0]) :]
