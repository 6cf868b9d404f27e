"""Prepared parameters: every block kind gives the results of the parameters they were made from."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest

from tests.generate.small import VOCAB_SIZE
from xlstm_jax.errors import ArgumentError
from xlstm_jax.generate import generate, prepare_params
from xlstm_jax.modules import BLOCKS, LM, LMConfig
from xlstm_jax.modules.stack import unstack_layers


def random_model(pattern, dtype="float32"):
    model = LM(LMConfig(vocab_size=VOCAB_SIZE, dim=64, pattern=pattern, dtype=dtype))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda key, leaf: 0.3 * jax.random.normal(key, leaf.shape)  # noqa: E731
    return model, structure.unflatten(map(draw, keys, leaves))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "letter", [pytest.param(x, marks=[] if x == "M" else pytest.mark.slow) for x in BLOCKS]
)
def test_a_step_equals_that_of_the_original_parameters(letter, dtype):
    model, variables = random_model(2 * letter, dtype)
    prepared = prepare_params(model, variables)
    tokens, mask = jnp.array([[3], [5]]), jnp.array([[True], [False]])
    state = model.init_state(2)
    apply = jax.jit(model.apply)
    logits, new = apply(variables, tokens, state=state, mask=mask)
    layers = unstack_layers(model.cfg.pattern, state)
    actual, new_layers = apply(prepared, tokens, state=layers, mask=mask)
    tolerance = 1e-6 if dtype == "float32" else 4e-3  # the rounding of one element
    expected = logits, unstack_layers(model.cfg.pattern, new)
    chex.assert_trees_all_close((actual, new_layers), expected, rtol=tolerance, atol=tolerance)


def test_projections_are_joined_and_cast_once():
    model, variables = random_model("MM", "bfloat16")
    layer = prepare_params(model, variables)["params"]["stack"]["M"][1]
    assert set(layer["mlstm"]) == {
        "q+k+v+output_gate",
        "input_gate+forget_gate",
        "multihead_norm",
        "out_proj",
    }
    names = {path[-1].key: leaf.dtype for path, leaf in jax.tree.leaves_with_path(layer)}
    assert names == {"kernel": jnp.bfloat16, "bias": jnp.float32, "scale": jnp.float32}
    step = jax.jit(model.apply).lower(
        prepare_params(model, variables),
        jnp.array([[1]]),
        state=unstack_layers("MM", model.init_state(1)),
    )
    # Weights are neither sliced out of a stack, nor concatenated, nor cast.
    assert not re.search(r"concatenate.*64x\d+xf32|dynamic_slice.*2x64x", step.as_text())


@pytest.mark.parametrize("pattern", ["ms", pytest.param("Mabdr", marks=pytest.mark.slow)])
def test_with_a_number_of_slots_a_result_does_not_depend_on_the_others_bit_for_bit(pattern, key):
    model, variables = random_model(pattern)
    variables = prepare_params(model, variables)
    prompts = [[1], [5, 4, 3, 2, 1, 0, 7], list(range(11)) * 3, [9, 9], [2] * 20]
    keys = jax.random.split(key, len(prompts))
    options = dict(max_new_tokens=6, slots=3)
    together = generate(model, variables, prompts, **options, key=keys)
    for i in (1, 2, 4):
        alone = generate(model, variables, [prompts[i]], **options, key=keys[i : i + 1])
        assert (alone.tokens[0], alone.logprobs[0]) == (together.tokens[i], together.logprobs[i])
        states = jax.tree.map(lambda a, b, i=i: a[:, 0] == b[:, i], alone.state, together.state)
        assert all(bool(equal.all()) for equal in jax.tree.leaves(states))


def test_log_probabilities_are_those_of_the_tokens():
    model, variables = random_model("ms")
    result = generate(model, variables, [[1, 2, 3]], max_new_tokens=4)
    tokens = jnp.array([[1, 2, 3, *result.tokens[0]]])
    logits, _ = model.apply(variables, tokens)
    expected = jax.nn.log_softmax(logits[0, 2:-1])[jnp.arange(4), tokens[0, 3:]]
    assert jnp.allclose(jnp.array(result.logprobs[0]), expected, atol=1e-4)


def test_parameters_of_another_config_are_rejected():
    model, variables = random_model("M")
    other = LM(LMConfig(vocab_size=VOCAB_SIZE, dim=128, pattern="M"))
    with pytest.raises(ArgumentError, match="those of this config: leaf 'M/ffn/proj_down/kernel'"):
        prepare_params(other, variables)
    with pytest.raises(ArgumentError, match="dtype must be one of .*got 'float8'"):
        prepare_params(model, variables, dtype="float8")


@pytest.mark.parametrize(
    "pattern,window", [("MMM", 0), pytest.param("mm", 3, marks=pytest.mark.slow)]
)
def test_the_state_has_the_size_of_the_formula_whatever_the_length(pattern, window):
    model, variables = random_model(pattern)
    for length in (1, 40):
        state = generate(model, variables, [[1] * length], max_new_tokens=1).state
        (leaves,) = (jax.tree.leaves(state[letter]) for letter in set(pattern))
        cell = state[pattern[0]] if not window else state[pattern[0]].cell
        _, _, H, K, V = cell.C.shape
        inner_dim = H * V  # of the convolution, whose state is its last inputs
        expected = len(pattern) * (H * (K * V + K + 1) + window * inner_dim)
        assert sum(leaf.size for leaf in leaves) == expected
