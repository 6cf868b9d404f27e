"""Invariants of every block and of a mixed model: splitting sequences, packing and padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules import models
from tests.modules.models import BASELINES, LETTERS, MIXED, MIXED_BASELINES

pytestmark = pytest.mark.usefixtures("x64")

# Two models have all kinds of blocks; the others tell which kind fails.
ALL = (*LETTERS, *BASELINES)
each_pattern = pytest.mark.parametrize(
    "pattern",
    [MIXED, MIXED_BASELINES, *(pytest.param(letter, marks=pytest.mark.slow) for letter in ALL)],
)

TOLERANCE = 1e-10  # relative to the largest element, in float64


def _assert_same(actual, expected, tolerance=TOLERANCE):
    flat = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, b in flat:
        scale = max(np.abs(b).max(initial=0.0), 1e-3)
        assert a.shape == b.shape
        assert np.abs(a - b).max(initial=0.0) <= tolerance * scale


def _model(pattern):
    """Convolutions mix channels in models of a single kind, and are depthwise in the mixed one."""
    cfg = models.config(pattern)
    mixing = {
        field: dataclasses.replace(getattr(cfg, field), conv_mixing=pattern != MIXED)
        for field in ("mlstm", "slstm")
    }
    return models.model_and_variables(dataclasses.replace(cfg, **mixing), dtype=np.float64)


@each_pattern
def test_prefill_and_single_steps_equal_one_pass(pattern):
    model, variables = _model(pattern)
    tokens = models.tokens(0, 2, 9)
    expected, final = models.apply(model, variables, tokens)
    prefix, state = models.apply(model, variables, tokens[:, :5], model.init_state(2))
    step = jax.jit(model.apply)
    outputs = [prefix]
    for t in range(5, 9):
        logits, state = step(variables, tokens[:, t : t + 1], state)
        outputs.append(logits)
    _assert_same(jnp.concatenate(outputs, axis=1), expected)
    _assert_same(state, final)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [MIXED, MIXED_BASELINES, *ALL])
def test_packed_sequence_equals_separate_documents_in_logits_and_gradients(pattern):
    model, variables = _model(pattern)
    documents = models.tokens(0, 3, 3)
    padding = jnp.zeros((1, 2), jnp.int32)
    packed = jnp.concatenate([documents.reshape(1, 9), padding], axis=1)
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0]])
    weights = jnp.cos(jnp.arange(99.0)).reshape(1, 9, 11)

    def packed_loss(variables):
        logits, _ = model.apply(variables, packed, segment_ids=segment_ids)
        return jnp.sum(logits[:, :9] * weights), logits[:, :9]

    def separate_loss(variables):
        logits, _ = model.apply(variables, documents)
        return jnp.sum(logits.reshape(weights.shape) * weights), logits.reshape(weights.shape)

    (_, actual), actual_grads = jax.jit(jax.value_and_grad(packed_loss, has_aux=True))(variables)
    (_, expected), expected_grads = jax.jit(jax.value_and_grad(separate_loss, has_aux=True))(
        variables
    )
    _assert_same(actual, expected)
    _assert_same(actual_grads, expected_grads, 1e-9)


@each_pattern
def test_masked_sequence_equals_the_sequence_without_masked_positions(pattern):
    model, variables = _model(pattern)
    tokens = models.tokens(0, 1, 8)
    mask = jnp.array([[False, True, True, False, False, True, True, False]])
    logits, state = models.apply(model, variables, tokens, model.init_state(1), mask=mask)
    expected, final = models.apply(model, variables, tokens[mask][None], model.init_state(1))
    _assert_same(logits[mask][None], expected)
    _assert_same(state, final)


def test_initial_state_reaches_only_the_first_document_of_a_padded_sequence():
    model, variables = _model(MIXED)
    empty = model.init_state(1)
    state = models.perturbed(empty, dtype=np.float64)
    tokens = models.tokens(0, 1, 5)
    segment_ids = jnp.array([[0, 4, 4, 5, 5]])
    logits, _ = models.apply(model, variables, tokens, state, segment_ids)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state, empty)
    expected, _ = models.apply(model, variables, tokens[:, 1:].reshape(2, 2), both)
    _assert_same(logits[:, 1:], expected.reshape(1, 4, -1))


def test_float64_parameters_give_float64_logits_and_states():
    model, variables = _model(MIXED)
    logits, state = models.apply(model, variables, models.tokens(0, 1, 5))
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, state))} == {jnp.dtype("float64")}


def test_parameters_are_initialized_in_float32_under_x64(key):
    shapes = jax.eval_shape(models.LM(models.config()).init, key, jnp.zeros((1, 2), jnp.int32))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
