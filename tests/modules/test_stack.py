"""The scanned stack: what a loop over blocks would give, at a cost that depth does not change."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules import models
from xlstm_jax.modules import BLOCKS, LM, presets
from xlstm_jax.modules.patterns import cut
from xlstm_jax.modules.stack import Stack


def _unrolled(cfg, params, x, state, reset, mask):
    for run, run_params, run_state in zip(cut(cfg.pattern), params.values(), state, strict=True):
        for repeat in range(run.repeats):
            for j, letter in enumerate(run.unit):
                own, own_state = jax.tree.map(
                    lambda leaf, n=repeat: leaf[n], (run_params[f"block_{j}"], run_state[j])
                )
                x, _ = BLOCKS[letter](cfg).apply({"params": own}, x, own_state, reset, mask)
    return x


def test_a_scan_over_blocks_equals_the_loop(key):
    cfg = models.config("mmmsmsMM")
    assert [run.unit for run in cut(cfg.pattern)] == ["m", "ms", "M"]
    stack = Stack(cfg)
    x = jax.random.normal(key, (2, 5, cfg.dim))
    reset = jax.random.bernoulli(jax.random.key(1), 0.2, (2, 5))
    mask = jax.random.bernoulli(jax.random.key(2), 0.8, (2, 5))
    params = models.model_and_variables(cfg)[1]["params"]["stack"]
    state = models.shaken(LM(cfg).init_state(2), seed=1)
    actual, _ = jax.jit(stack.apply)({"params": params}, x, state, reset, mask)
    expected = jax.jit(functools.partial(_unrolled, cfg))(params, x, state, reset, mask)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * float(jnp.abs(actual).max()))


def test_parameters_and_states_have_the_layers_first(key):
    cfg = models.config("mmmsms")
    shapes = jax.eval_shape(LM(cfg).init, key, jnp.zeros((1, 1), jnp.int32))["params"]
    for i, run in enumerate(cut(cfg.pattern)):
        leaves = jax.tree.leaves(shapes["stack"][f"run_{i}"])
        assert {leaf.shape[0] for leaf in leaves} == {run.repeats}
    for run, run_state in zip(cut(cfg.pattern), LM(cfg).init_state(5), strict=True):
        assert len(run_state) == len(run.unit)
        assert {leaf.shape[:2] for leaf in jax.tree.leaves(run_state)} == {(run.repeats, 5)}


def test_every_block_starts_differently(key):
    params = jax.jit(LM(models.config("MM")).init)(key, jnp.zeros((1, 1), jnp.int32))["params"]
    kernel = params["stack"]["run_0"]["block_0"]["mlstm"]["q"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


def test_every_block_knows_its_place_in_the_model(key):
    """The forget bias of the sLSTM blocks at 1, 3 and 5 of 6, bent by their depth."""
    cfg = models.config("msmsms")
    params = jax.jit(LM(cfg).init)(key, jnp.zeros((1, 1), jnp.int32))["params"]
    bias = params["stack"]["run_0"]["block_1"]["slstm"]["bias"][:, 0, 1]
    share = np.linspace(0, 1, 8)
    expected = [5 - 12 * share ** (0.3 + 1.3 * block / 5) for block in (1, 3, 5)]
    np.testing.assert_allclose(bias, expected, rtol=0, atol=1e-5)


def test_a_returned_state_has_the_form_of_an_empty_one():
    model, variables = models.model_and_variables(models.config())
    apply = lambda: model.apply(variables, jnp.zeros((3, 2), jnp.int32))[1]  # noqa: E731
    describe = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    expected = jax.tree.map(describe, jax.eval_shape(lambda: model.init_state(3)))
    assert jax.tree.map(describe, jax.eval_shape(apply)) == expected


@functools.cache
def _gradient(remat):
    model, variables = models.model_and_variables(models.config("ms", remat=remat))
    tokens = models.tokens(0, 1, 4)
    loss = lambda variables: jnp.sum(jnp.sin(model.apply(variables, tokens)[0]))  # noqa: E731
    return jax.tree.leaves(jax.jit(jax.grad(loss))(variables))


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "remat", ["names", pytest.param("dots", marks=slow), pytest.param("full", marks=slow)]
)
def test_gradients_do_not_depend_on_what_is_kept_for_them(remat):
    actual, expected = _gradient(remat), _gradient("none")
    largest = max(float(jnp.abs(leaf).max()) for leaf in expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


def test_what_is_made_again_is_not_kept():
    """Of four blocks, few enough to be compiled one by one."""

    def temporary_bytes(remat):
        model = LM(models.config("mmmm", remat=remat))
        tokens = jnp.zeros((4, 64), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
        loss = jax.grad(lambda v, t: jnp.sum(model.apply(v, t)[0]))
        program = jax.jit(loss).lower(shapes, tokens).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("full") < 0.6 * temporary_bytes("none")


def _num_operations(cfg) -> int:
    """Operations of the lowered gradient of a whole model."""
    model = LM(cfg)
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    loss = jax.grad(lambda v, t: jnp.sum(model.apply(v, t)[0]))
    return len(re.findall(r" = ", jax.jit(loss).lower(shapes, tokens).as_text()))


@pytest.mark.parametrize("pattern", ["m", "M", "ms"])
def test_a_program_does_not_grow_with_depth(pattern):
    shallow, deep = (_num_operations(models.config(pattern * n)) for n in (8, 32))
    assert abs(deep / shallow - 1) < 0.05


def test_an_irregular_preset_is_as_large_a_program_as_its_shortening():
    cfg = presets.get("xlstm_350m_7:1")
    small = dataclasses.replace(models.config(), pattern=cfg.pattern)
    short = dataclasses.replace(small, pattern="mmsmsmsmm")
    assert sum(len(run.unit) for run in cut(cfg.pattern)) == 7
    assert _num_operations(small) < 2.5 * _num_operations(short)
