"""States of models, blocks and layers: dtypes, buffers, and messages for foreign ones."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules import models
from xlstm_jax.modules import BLOCKS, LM, Backbone, LargeMLSTMLayer, MLSTMLayer, SLSTMLayer

DTYPES = ["float32", "bfloat16", "float64"]


def _dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


def _setup(dtype) -> tuple[Any, Any, Any]:
    """Config, dtype of parameters and argument of `init_state` for activations of a dtype."""
    if dtype == "float64":
        return models.config(), np.float64, jnp.float64
    return models.config(dtype=dtype), np.float32, None


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scan_over_calls_of_a_model_keeps_the_dtypes_of_its_initial_state(dtype):
    cfg, params_dtype, argument = _setup(dtype)
    model, variables = models.model_and_variables(cfg, dtype=params_dtype)

    def run(tokens):
        step = lambda state, t: model.apply(variables, t[:, None], state)[::-1]  # noqa: E731
        return jax.lax.scan(step, model.init_state(2, argument), tokens.T)[0]

    expected = _dtypes(jax.eval_shape(lambda: model.init_state(2, argument)))
    tokens = models.tokens(0, 2, 3)
    assert _dtypes(jax.eval_shape(run, tokens)) == expected
    assert _dtypes(jax.eval_shape(model.apply, variables, tokens)[1]) == expected
    wide = "float64" if dtype == "float64" else "float32"
    narrow = {leaf.conv for leaf in expected.values() if hasattr(leaf, "conv")}
    assert narrow == {jnp.dtype(dtype)}
    assert {leaf for leaf in jax.tree.leaves(expected)} == narrow | {jnp.dtype(wide)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("letter", models.BASELINES)
def test_blocks_of_baselines_return_states_of_the_dtypes_of_their_initial_state(letter, dtype, key):
    """A cache of attention and last inputs have the dtype of activations."""
    cfg, params_dtype, argument = _setup(dtype)
    block = BLOCKS[letter].block(dataclasses.replace(cfg, pattern=letter))
    x = jnp.zeros((2, 3, cfg.dim), dtype)
    state = block.init_state(2, argument)
    shapes = jax.eval_shape(block.init, key, x)
    variables = jax.tree.map(lambda a: jnp.zeros(a.shape, params_dtype), shapes)
    _, new = jax.eval_shape(block.apply, variables, x, state)
    assert _dtypes(new) == _dtypes(state)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("letter", models.LETTERS)
def test_blocks_and_layers_return_states_of_the_dtypes_of_their_initial_state(letter, dtype, key):
    cfg = models.config(letter)
    x = jnp.zeros((2, 3, cfg.dim), dtype)
    params_dtype = "float64" if dtype == "float64" else "float32"
    layer = _layer(letter)
    for module, state in (
        (BLOCKS[letter].block(cfg), BLOCKS[letter].block(cfg).init_state(2, dtype)),
        (layer, layer.init_state(2, cfg.dim, dtype)),
    ):
        shapes = jax.eval_shape(module.init, key, x)
        variables = jax.tree.map(lambda a: jnp.zeros(a.shape, params_dtype), shapes)
        _, new = jax.eval_shape(module.apply, variables, x, state)
        assert _dtypes(new) == _dtypes(state)


def _layer(letter):
    cfg = models.config()
    layers = {
        "m": MLSTMLayer(cfg.mlstm),
        "s": SLSTMLayer(cfg.slstm),
        "M": LargeMLSTMLayer(cfg.large),
    }
    return layers[letter]


def test_dtype_of_a_state_selects_that_of_convolutions_and_float64_that_of_all_leaves(x64):
    model = LM(models.config("m"))
    for dtype, cell in (("bfloat16", "float32"), (jnp.bfloat16, "float32"), ("float64",) * 2):
        state = model.init_state(1, dtype)["m"]
        assert state.conv.dtype == jnp.dtype(dtype)
        assert set(jax.tree.leaves(_dtypes(state.cell))) == {jnp.dtype(cell)}
    with pytest.raises(ValueError, match=r"dtype must be one of \('float32', .*\), got 'int32'"):
        model.init_state(1, "int32")


@pytest.mark.parametrize(
    "pattern",
    ["m", "s", "M", "mmsM", pytest.param(models.MIXED_BASELINES, marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("error")
def test_initial_state_can_be_donated(pattern):
    model = LM(models.config(pattern))
    increment = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    for make in (model.init_state, jax.jit(model.init_state, static_argnums=0)):
        state = make(2)
        leaves = jax.tree.leaves(state)
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
        assert all(jnp.all(leaf == 1) for leaf in jax.tree.leaves(increment(state)))


def _integers(state):
    return jax.tree.map(lambda leaf: leaf.astype(int), state)


def _without_m(state):
    return {**state, "s": state["s"]._replace(cell=state["s"].cell._replace(m=None))}


FOREIGN = {
    "batch": (
        lambda model: model.init_state(3),
        r"'m/conv' must be .* \(1, 2, 3, 24\), got .* \(1, 3,",
    ),
    "pattern": (
        lambda model: LM(models.config("mM")).init_state(2),
        r"'s/conv' must be floats of shape \(1, 2, 2, 16\), got nothing",
    ),
    "more letters": (
        lambda model: LM(models.config("msM")).init_state(2),
        r"'M/C' must be nothing, got floats of shape \(1, 2, 2, 6, 10\)",
    ),
    "depth": (
        lambda model: LM(models.config("mms")).init_state(2),
        r"'m/conv' must be .*got .*\(2,",
    ),
    "tuple": (lambda model: tuple(model.init_state(2).values()), "'m/conv' .* got nothing"),
    "no leaves": (lambda model: {"m": None, "s": None}, "'m/conv' must be .* got nothing"),
    "one leaf None": (lambda model: _without_m(model.init_state(2)), "'s/cell/m' .* got None"),
    "integers": (lambda model: _integers(model.init_state(2)), "'m/conv' .* got integers of shape"),
    "a number": (lambda model: 1.0, "'m/conv' must be floats of shape"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("kind", [LM, Backbone])
def test_state_of_another_model_is_rejected_with_its_first_differing_leaf(kind, case):
    make, message = FOREIGN[case]
    model, x = _model_and_input(kind, "ms")
    start, end = "^state must be that of pattern='ms' and 2", r"; use init_state\(2\) of the same m"
    with pytest.raises(ValueError, match=f"{start}.*{message}.*{end}"):
        model.apply(_variables(kind), x, make(model))


def _model_and_input(kind, pattern, **changes):
    cfg = models.config(pattern, **changes)
    x = jnp.zeros((2, 3), jnp.int32) if kind is LM else jnp.zeros((2, 3, cfg.dim))
    return kind(cfg), x


@functools.cache
def _variables(kind):
    variables = models.model_and_variables(models.config("ms"))[1]
    if kind is LM:
        return variables
    return {"params": {name: variables["params"][name] for name in ("stack", "out_norm")}}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("letter", models.LETTERS)
def test_layers_and_blocks_reject_a_foreign_state(letter, key):
    cfg, x = models.config(letter), jnp.zeros((2, 3, 16))
    layer, block = _layer(letter), BLOCKS[letter].block(cfg)
    leaf = "C" if letter == "M" else "conv"
    message = (
        f"^state must be that of {type(layer).__name__} and 2 sequences of width 16: leaf '{leaf}'"
    )
    for module, state in (
        (layer, layer.init_state(3, 16)),
        (layer, tuple(layer.init_state(2, 16))),
        (layer, {}),
        (block, block.init_state(3)),
    ):
        variables = jax.eval_shape(module.init, key, x)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.apply, variables, x, state)


def test_cache_of_another_size_is_rejected():
    cfg = models.config("a")
    longer = dataclasses.replace(cfg.attention, cache_size=9)
    model, x = _model_and_input(LM, "a", attention=longer)
    message = r"leaf 'a/k' must be .* \(1, 2, 2, 9, 8\), got .* \(1, 2, 2, 7, 8\); use init_state"
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, variables, x, LM(cfg).init_state(2))


CHANGES = {
    "width": (dict(dim=32), r"leaf 'out_norm/scale_offset' must be .* \(32,\), got .* \(16,\)"),
    "heads": (
        dict(slstm=models.config().slstm.__class__(num_heads=4, ffn_dim=20, conv_width=3)),
        r"leaf 'stack/s/slstm/bias' must be floats of shape \(1, 4, 4, 4\), got .* \(1, 2, 4, 8\)",
    ),
    "letters": (dict(pattern="m"), r"no entries but \['m'\], got also \['s'\]"),
}
LM_CHANGES = {
    "width": (dict(dim=32), r"leaf 'lm_head/kernel' must be floats of shape \(32, 11\), got .*"),
    "vocabulary": (dict(vocab_size=13), r"leaf 'lm_head/kernel' .* \(16, 13\), got .* \(16, 11\)"),
    "tied head": (dict(tie_embeddings=True), r"no entries but .* got also \['lm_head'\]"),
    "no norm": (dict(final_norm="none"), r"no entries but .* got also \['out_norm'\]"),
    "other norm": (dict(final_norm="rms"), "leaf 'out_norm/scale' must be .* got nothing"),
}


@pytest.mark.parametrize(
    "kind, case", [*((Backbone, case) for case in CHANGES), *((LM, case) for case in LM_CHANGES)]
)
def test_parameters_of_another_config_are_rejected_with_their_first_differing_leaf(kind, case):
    changes, message = (CHANGES if kind is Backbone else LM_CHANGES)[case]
    model, x = _model_and_input(kind, **{"pattern": "ms"} | changes)
    with pytest.raises(ValueError, match=f"^params must .*{message}; use parameters from `init`"):
        jax.eval_shape(model.apply, _variables(kind), x)


def test_parameters_without_their_collection_are_rejected():
    model, tokens = _model_and_input(LM, "ms")
    with pytest.raises(ValueError, match=r"variables must be a dict with the key 'params'.*\['lm_"):
        model.apply(_variables(LM)["params"], tokens)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shape", [(2, 3, 32), (3, 16)])
def test_inputs_of_another_width_are_rejected(shape):
    model, _ = _model_and_input(Backbone, "ms")
    with pytest.raises(ValueError, match=r"x must have the axes \(B T D\) with D=16, got"):
        model.apply(_variables(Backbone), jnp.zeros(shape))
