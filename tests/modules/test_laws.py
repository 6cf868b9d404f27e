"""Laws of every block and of a mixed model: time may be cut, documents and padding do not leak."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules import models
from tests.modules.models import LETTERS, MIXED

pytestmark = pytest.mark.usefixtures("x64")

# One mixed model holds every block; the blocks apart say which one fails.
each_pattern = pytest.mark.parametrize(
    "pattern", [MIXED, *(pytest.param(letter, marks=pytest.mark.slow) for letter in LETTERS)]
)

TOLERANCE = 1e-10  # relative to the largest element, in float64


def _assert_same(actual, expected, tolerance=TOLERANCE):
    flat = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, b in flat:
        scale = max(np.abs(b).max(initial=0.0), 1e-3)
        assert a.shape == b.shape
        assert np.abs(a - b).max(initial=0.0) <= tolerance * scale


def _model(pattern):
    """Where one kind of block is alone, its convolution mixes channels."""
    cfg = models.config(pattern)
    mixing = {
        field: dataclasses.replace(getattr(cfg, field), conv_mixing=pattern != MIXED)
        for field in ("mlstm", "slstm")
    }
    return models.model_and_variables(dataclasses.replace(cfg, **mixing), dtype=np.float64)


@each_pattern
def test_prefill_then_single_steps_equal_the_whole_sequence(pattern):
    model, variables = _model(pattern)
    tokens = models.tokens(0, 2, 9)
    whole, final = models.apply(model, variables, tokens)
    start, state = models.apply(model, variables, tokens[:, :5], model.init_state(2))
    step = jax.jit(model.apply)
    steps = [start]
    for t in range(5, 9):
        logits, state = step(variables, tokens[:, t : t + 1], state)
        steps.append(logits)
    _assert_same(jnp.concatenate(steps, axis=1), whole)
    _assert_same(state, final)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [MIXED, *LETTERS])
def test_a_packed_row_equals_its_documents_apart_in_logits_and_gradients(pattern):
    model, variables = _model(pattern)
    documents = models.tokens(0, 3, 3)
    padding = jnp.zeros((1, 2), jnp.int32)
    packed = jnp.concatenate([documents.reshape(1, 9), padding], axis=1)
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0]])
    weights = jnp.cos(jnp.arange(99.0)).reshape(1, 9, 11)

    def of_row(variables):
        logits, _ = model.apply(variables, packed, segment_ids=segment_ids)
        return jnp.sum(logits[:, :9] * weights), logits[:, :9]

    def of_documents(variables):
        logits, _ = model.apply(variables, documents)
        return jnp.sum(logits.reshape(weights.shape) * weights), logits.reshape(weights.shape)

    (_, actual), actual_gradient = jax.jit(jax.value_and_grad(of_row, has_aux=True))(variables)
    (_, expected), gradient = jax.jit(jax.value_and_grad(of_documents, has_aux=True))(variables)
    _assert_same(actual, expected)
    _assert_same(actual_gradient, gradient, 1e-9)


@each_pattern
def test_a_masked_row_equals_the_row_without_those_positions(pattern):
    model, variables = _model(pattern)
    tokens = models.tokens(0, 1, 8)
    mask = jnp.array([[False, True, True, False, False, True, True, False]])
    logits, state = models.apply(model, variables, tokens, model.init_state(1), mask=mask)
    expected, final = models.apply(model, variables, tokens[mask][None], model.init_state(1))
    _assert_same(logits[mask][None], expected)
    _assert_same(state, final)


def test_a_state_given_to_a_padded_row_is_read_by_its_first_document_alone():
    model, variables = _model(MIXED)
    empty = model.init_state(1)
    state = models.shaken(empty, dtype=np.float64)
    tokens = models.tokens(0, 1, 5)
    segment_ids = jnp.array([[0, 4, 4, 5, 5]])
    logits, _ = models.apply(model, variables, tokens, state, segment_ids)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state, empty)
    expected, _ = models.apply(model, variables, tokens[:, 1:].reshape(2, 2), both)
    _assert_same(logits[:, 1:], expected.reshape(1, 4, -1))


def test_float64_parameters_are_used_in_float64_everywhere():
    model, variables = _model(MIXED)
    logits, state = models.apply(model, variables, models.tokens(0, 1, 5))
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, state))} == {jnp.dtype("float64")}


def test_parameters_start_in_float32_where_float64_is_allowed(key):
    shapes = jax.eval_shape(models.LM(models.config()).init, key, jnp.zeros((1, 2), jnp.int32))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
