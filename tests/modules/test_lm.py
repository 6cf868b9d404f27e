"""Embedding, head, dtypes, dropout and argument checks of the language model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules import models
from xlstm_jax.modules import LM, MLSTMConfig, SLSTMConfig, head_kernel, lm_logits


def test_tied_head_is_the_transposed_embedding():
    cfg = models.config("m", tie_embeddings=True, logit_soft_cap=None)
    model, variables = models.model_and_variables(cfg)
    assert "lm_head" not in variables["params"]
    tokens = models.tokens(0, 1, 3)
    hidden, _ = models.apply(model, variables, tokens, head=False)
    logits, _ = models.apply(model, variables, tokens)
    kernel = head_kernel(cfg, variables["params"])
    last = lm_logits(cfg, variables["params"], hidden[:, -1])
    np.testing.assert_allclose(last, logits[:, -1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kernel, variables["params"]["token_embedding"]["embedding"].T)
    np.testing.assert_allclose(logits, hidden @ kernel, rtol=1e-5, atol=1e-5)


def test_logits_are_the_soft_capped_product_of_hidden_states_and_head():
    cfg = models.config("M", logit_soft_cap=0.5)
    model, variables = models.model_and_variables(cfg)
    tokens = models.tokens(0, 1, 3)
    hidden, _ = models.apply(model, variables, tokens, head=False)
    logits, _ = models.apply(model, variables, tokens)
    uncapped = hidden @ head_kernel(cfg, variables["params"])
    np.testing.assert_allclose(logits, 0.5 * jnp.tanh(uncapped / 0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "norm, parameters",
    [("layer", {"scale_offset", "bias"}), ("rms", {"scale", "bias"}), ("none", set())],
)
def test_final_norm_option_selects_the_norm(norm, parameters, key):
    cfg = models.config("m", final_norm=norm, final_norm_bias=True)
    shapes = jax.eval_shape(LM(cfg).init, key, jnp.zeros((1, 1), jnp.int32))["params"]
    assert set(shapes.get("out_norm", {})) == parameters


@pytest.mark.slow
def test_bfloat16_activations_keep_recurrent_state_and_logits_in_float32():
    cfg = models.config(dtype="bfloat16")
    model, variables = models.model_and_variables(cfg)
    tokens = models.tokens(0, 2, 6)
    logits, state = jax.eval_shape(model.apply, variables, tokens)
    hidden, _ = jax.eval_shape(lambda *x: model.apply(*x, head=False), variables, tokens)
    assert logits.dtype == jnp.float32 and hidden.dtype == jnp.bfloat16
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        is_conv = ".conv" in jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.bfloat16 if is_conv else jnp.float32), path
    grads = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, tokens)[0]))))(variables)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_bfloat16_activations_change_logits_by_a_few_percent():
    """The median of five random models: a single one may amplify rounding errors."""
    bfloat16, float32 = (LM(models.config(dtype=dtype)) for dtype in ("bfloat16", "float32"))
    tokens = models.tokens(0, 2, 6)

    @jax.jit
    def error(variables):
        expected = float32.apply(variables, tokens)[0]
        difference = bfloat16.apply(variables, tokens)[0] - expected
        return jnp.sqrt(jnp.mean(jnp.square(difference)) / jnp.mean(jnp.square(expected)))

    errors = [error(models.model_and_variables(float32.cfg, seed)[1]) for seed in range(5)]
    assert 0 < np.median(errors) < 0.05


@pytest.mark.parametrize("letter", ["m", "s"])
def test_dropout_needs_deterministic_false_and_depends_on_the_key(letter):
    slstm = SLSTMConfig(num_heads=2, ffn_dim=0)
    cfg = models.config(letter, dropout=0.5, slstm=slstm)
    model, variables = models.model_and_variables(cfg)
    tokens = models.tokens(0, 1, 4)

    def run(seed, **options):
        rngs = {"dropout": jax.random.key(seed)}
        return models.apply(model, variables, tokens, rngs=rngs, **options)[0]

    plain = models.apply(LM(models.config(letter, slstm=slstm)), variables, tokens)[0]
    np.testing.assert_array_equal(run(0), plain)
    dropped = run(0, deterministic=False)
    assert not np.allclose(dropped, plain)
    np.testing.assert_array_equal(dropped, run(0, deterministic=False))
    assert not np.allclose(dropped, run(1, deterministic=False))


def test_embedding_dropout_zeroes_its_rate_of_the_input(key):
    # A residual block whose layer outputs zero is the identity.
    cfg = models.config("m", dropout=0.5, embedding_dropout=True, final_norm="none", dim=64)
    cfg = dataclasses.replace(cfg, mlstm=MLSTMConfig(num_heads=2, inner_dim=8))
    model, variables = models.model_and_variables(cfg)
    variables["params"]["stack"] = jax.tree.map(jnp.zeros_like, variables["params"]["stack"])
    options = dict(head=False, deterministic=False, rngs={"dropout": key})
    hidden, _ = models.apply(model, variables, models.tokens(0, 2, 32), **options)
    assert 0.45 < float(jnp.mean(hidden == 0)) < 0.55


TOKENS = jnp.zeros((2, 3), jnp.int32)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "tokens, arguments, message",
    [
        (TOKENS[0], {}, r"tokens must have the axes \(B T\) .* got \(3,\); .*tokens\[None\]"),
        (TOKENS[:, :0], {}, r"tokens must have .* at least one position, got \(2, 0\)"),
        (TOKENS, dict(mask=TOKENS[:, :2] == 0), r"mask must have the shape of tokens, \(2, 3\)"),
        (TOKENS, dict(segment_ids=TOKENS[:1]), r"segment_ids must have .* got \(1, 3\);"),
    ],
)
def test_invalid_arguments_are_rejected(tokens, arguments, message):
    model, variables = models.model_and_variables(models.config("m"))
    with pytest.raises(ValueError, match=message):
        model.apply(variables, tokens, **arguments)
