"""The stack equals a Python loop over blocks, and its program size does not depend on depth."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules import models
from xlstm_jax.modules import BLOCKS, LM, presets, stack


def _python_loop(cfg, params, x, state, reset, mask):
    """The output, and the new states as a list in the order of the pattern."""
    counts, states = dict.fromkeys(cfg.pattern, 0), []
    apply = {letter: jax.jit(BLOCKS[letter].block(cfg).apply) for letter in counts}
    take = jax.jit(lambda tree, n: jax.tree.map(lambda leaf: leaf[n], tree))
    for letter in cfg.pattern:
        block_params, block_state = take((params[letter], state and state[letter]), counts[letter])
        variables = {"params": block_params}
        x, new_state = apply[letter](variables, x, block_state, reset=reset, mask=mask)
        states.append(new_state)
        counts[letter] += 1
    return x, states


def _in_order(cfg, states):
    """States by letter as a list in the order of the pattern."""
    remaining = {
        letter: iter([jax.tree.map(lambda leaf, n=n: leaf[n], tree) for n in range(count)])
        for letter, tree in states.items()
        for count in [jax.tree.leaves(tree)[0].shape[0]]
    }
    return [next(remaining[letter]) for letter in cfg.pattern]


def _value_and_grads(run, params, x, state):
    """Value and gradients of a weighted sum over all outputs, each leaf with its own weight."""

    @jax.jit
    def weighted_sum(leaves):
        return sum(np.cos(n) * jnp.sum(jnp.sin(leaf)) for n, leaf in enumerate(leaves))

    def loss(*args):
        return weighted_sum(jax.tree.leaves(run(*args)))

    return jax.value_and_grad(loss, (0, 1, 2))(params, x, state)


slow = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("with_state", [True, pytest.param(False, marks=slow)], ids=["state", ""])
@pytest.mark.parametrize(
    "pattern, remat, num_bodies",
    [
        pytest.param("mms", "none", None, marks=slow),  # unrolled
        pytest.param("MMMsMsMM", "none", 4, marks=slow),  # several scans
        pytest.param("mmmsmmms", "none", 4, marks=slow),
        ("MMsMMs", "full", 2),  # one scan whose steps omit a letter
        pytest.param("MMMsMMMs", "full", 2, marks=slow),
        pytest.param("mmsmsMm", "full", 3, marks=slow),  # two omitted letters
        pytest.param("mmssmmM", "full", 4, marks=slow),  # no letter in all steps: several scans
    ],
)
def test_stack_equals_a_python_loop_over_blocks(pattern, remat, num_bodies, with_state, key, x64):
    """In float64: gradients through seven blocks amplify the rounding of float32."""
    cfg = models.config(pattern, remat=remat)
    if num_bodies is not None:
        assert sum(len(run.unit) for run in stack.choose_runs(cfg, 5)) == num_bodies
    x = jax.random.normal(key, (2, 5, cfg.dim), np.float64)
    reset = jax.random.bernoulli(jax.random.key(1), 0.2, (2, 5))
    mask = jax.random.bernoulli(jax.random.key(2), 0.8, (2, 5))
    params = models.model_and_variables(cfg, dtype=np.float64)[1]["params"]["stack"]
    state = models.perturbed(LM(cfg).init_state(2), 1, np.float64) if with_state else None

    def run_stack(params, x, state):
        y, states = stack.Stack(cfg).apply({"params": params}, x, state, reset, mask)
        return y, _in_order(cfg, states)

    actual = _value_and_grads(jax.jit(run_stack), params, x, state)
    expected = _value_and_grads(
        lambda *args: _python_loop(cfg, *args, reset, mask), params, x, state
    )
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * largest)


def test_parameters_and_states_have_a_leading_layers_axis(key):
    cfg = models.config("mmmsms")
    shapes = jax.eval_shape(LM(cfg).init, key, jnp.zeros((1, 1), jnp.int32))["params"]["stack"]
    state = LM(cfg).init_state(5)
    assert set(shapes) == set(state) == {"m", "s"}
    for letter, count in (("m", 4), ("s", 2)):
        assert {leaf.shape[0] for leaf in jax.tree.leaves(shapes[letter])} == {count}
        assert {leaf.shape[:2] for leaf in jax.tree.leaves(state[letter])} == {(count, 5)}


def test_blocks_are_initialized_independently_and_by_depth(key):
    """The power law of the forget bias depends on the index of the sLSTM block: 1, 3, 5 of 6."""
    cfg = models.config("MsMsMs")
    params = jax.jit(LM(cfg).init)(key, jnp.zeros((1, 1), jnp.int32))["params"]["stack"]
    kernel = params["M"]["mlstm"]["q"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    bias = params["s"]["slstm"]["bias"][:, 0, 1]
    fraction = np.linspace(0, 1, 8)
    expected = [5 - 12 * fraction ** (0.3 + 1.3 * block / 5) for block in (1, 3, 5)]
    np.testing.assert_allclose(bias, expected, rtol=0, atol=1e-5)


def test_returned_state_has_the_structure_of_the_initial_state():
    model, variables = models.model_and_variables(models.config())
    apply = lambda: model.apply(variables, jnp.zeros((3, 2), jnp.int32))[1]  # noqa: E731
    describe = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    expected = jax.tree.map(describe, jax.eval_shape(lambda: model.init_state(3)))
    assert jax.tree.map(describe, jax.eval_shape(apply)) == expected


@functools.cache
def _gradient(remat):
    model, variables = models.model_and_variables(models.config("MM", remat=remat))
    tokens = models.tokens(0, 1, 4)
    loss = lambda variables: jnp.sum(jnp.sin(model.apply(variables, tokens)[0]))  # noqa: E731
    return jax.tree.leaves(jax.jit(jax.grad(loss))(variables))


@pytest.mark.parametrize(
    "remat",
    ["names", *(pytest.param(name, marks=slow) for name in ("dots", "full", "offload"))],
)
def test_gradients_do_not_depend_on_rematerialization(remat):
    actual, expected = _gradient(remat), _gradient("none")
    largest = max(float(jnp.abs(leaf).max()) for leaf in expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.slow
def test_rematerialization_reduces_temporary_memory():
    """With four blocks, few enough to be unrolled without rematerialization."""

    def temporary_bytes(remat):
        model = LM(models.config("MMMM", remat=remat))
        tokens = jnp.zeros((4, 64), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
        loss = jax.grad(lambda v, t: jnp.sum(model.apply(v, t)[0]))
        program = jax.jit(loss).lower(shapes, tokens).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("full") < 0.6 * temporary_bytes("none")


def _num_operations(cfg) -> int:
    """Operations of the lowered gradient of a model."""
    model = LM(cfg)
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    loss = jax.grad(lambda v, t: jnp.sum(model.apply(v, t)[0]))
    return len(re.findall(r" = ", jax.jit(loss).lower(shapes, tokens).as_text()))


@pytest.mark.parametrize("pattern", ["M", "ms"])
def test_program_size_does_not_grow_with_depth(pattern):
    shallow, deep = (_num_operations(models.config(pattern * n)) for n in (8, 32))
    assert abs(deep / shallow - 1) < 0.05


def test_irregular_preset_compiles_to_the_size_of_a_short_pattern():
    cfg = presets.get("xlstm_350m_7:1")
    assert cfg.num_blocks == 48
    deep = dataclasses.replace(models.config(), pattern=cfg.pattern, remat=cfg.remat)
    shallow = dataclasses.replace(deep, pattern="mmsmsm")
    assert _num_operations(deep) < 1.05 * _num_operations(shallow)


def test_decoding_one_token_compiles_no_branches():
    """A branch stalls a GPU, and decoding has no residuals to rematerialize."""
    cfg = models.config("mmmsmmmmms", remat="names")
    assert all(run.always_has(letter) for run in stack.choose_runs(cfg, 1) for letter in run.unit)
    assert not stack.choose_runs(cfg, 2)[0].always_has("s")


@slow
def test_unrolled_and_scanned_models_draw_the_same_dropout(key):
    """Every loop derives dropout keys from the index of the block."""
    variables = models.model_and_variables(models.config("MMMsMM"))[1]
    options = dict(deterministic=False, rngs={"dropout": key})

    def logits(remat):
        model = LM(models.config("MMMsMM", remat=remat, dropout=0.5))
        return models.apply(model, variables, models.tokens(0, 2, 4), **options)[0]

    np.testing.assert_allclose(logits("none"), logits("full"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("pattern", ["mm", "mmmm", "mms"])
def test_parameters_of_another_pattern_are_rejected(pattern):
    variables = models.model_and_variables(models.config("mmm"))[1]
    with pytest.raises(ValueError, match="params of blocks '[ms]' must have . layers for pattern"):
        LM(models.config(pattern)).apply(variables, jnp.zeros((1, 2), jnp.int32))
