"""Every parameter is initialized as in the papers."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.modules import LM, LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.modules.initializers import jit_once, normal, random_key, uniform
from xlstm_jax.modules.slstm import cell_bias_init

DIM, NUM_BLOCKS = 128, 3
SMALL = math.sqrt(2 / (5 * DIM))
WANG = 2 / (NUM_BLOCKS * math.sqrt(DIM))


def _params(**changes):
    cfg = LMConfig(vocab_size=257, dim=DIM, pattern="msM", **changes)
    assert cfg.num_blocks == NUM_BLOCKS
    key, tokens = jax.random.key(0, impl="rbg"), jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(LM(cfg).init)(key, tokens)["params"]
    # Without the prefix "stack/".
    leaves = jax.tree_util.tree_leaves_with_path({**params.pop("stack"), **params})
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


@pytest.fixture(scope="module")
def params():
    return _params(mlstm=MLSTMConfig(use_bias=True), large=LargeConfig(use_bias=True))


STANDARD_DEVIATIONS = {
    "token_embedding/embedding": SMALL,
    "lm_head/kernel": SMALL,
    "m/mlstm/proj_up/kernel": SMALL,
    "m/mlstm/q_proj/kernel": SMALL,
    "m/mlstm/k_proj/kernel": SMALL,
    "m/mlstm/v_proj/kernel": SMALL,
    "m/mlstm/proj_down/kernel": WANG,
    "s/slstm/input_gate/kernel": SMALL,
    "s/slstm/forget_gate/kernel": SMALL,
    "s/slstm/cell_input/kernel": SMALL,
    "s/slstm/output_gate/kernel": SMALL,
    "s/ffn/proj_up/kernel": SMALL,
    "s/ffn/proj_down/kernel": WANG,
    "M/mlstm/q/kernel": SMALL,
    "M/mlstm/k/kernel": SMALL,
    "M/mlstm/v/kernel": SMALL,
    "M/mlstm/out_proj/kernel": WANG,
    "M/ffn/proj_up_gate/kernel": SMALL,
    "M/ffn/proj_up/kernel": SMALL,
    "M/ffn/proj_down/kernel": WANG,
}


@pytest.mark.parametrize("name", STANDARD_DEVIATIONS)
def test_projections_are_initialized_normal_with_the_published_std(params, name):
    leaf, std = params[name].ravel(), STANDARD_DEVIATIONS[name]
    error = 4 / math.sqrt(leaf.size)
    assert abs(leaf.mean()) < error * std
    assert abs(leaf.std() / std - 1) < error
    assert np.abs(leaf).max() > 2.5 * std  # not uniform


@pytest.mark.parametrize(
    "name", ["m/mlstm/conv/kernel", "m/mlstm/conv/bias", "s/slstm/conv/kernel"]
)
def test_convolutions_are_initialized_uniform_within_the_inverse_root_of_fan_in(params, name):
    assert 0.47 < np.abs(params[name]).max() <= 0.5
    assert abs(params[name].std() * math.sqrt(12) - 1) < 0.15


def test_convolutions_that_mix_channels_have_the_fan_in_of_all_of_them():
    params = _params(mlstm=MLSTMConfig(conv_mixing=True), slstm=SLSTMConfig(conv_mixing=True))
    for name in ("m/mlstm/conv", "s/slstm/conv"):
        kernel = params[f"{name}/kernel"]
        bound = 1 / math.sqrt(math.prod(kernel.shape[1:-1]))
        assert kernel.ndim == 4 and 0.95 * bound < np.abs(kernel).max() <= bound
        assert np.abs(params[f"{name}/bias"]).max() <= bound


CONSTANTS = {
    "m/mlstm/input_gate/kernel": 0.0,
    "m/mlstm/forget_gate/kernel": 0.0,
    "m/mlstm/learnable_skip": 1.0,
    "m/mlstm/out_norm/scale_offset": 0.0,
    "m/mlstm/proj_up/bias": 0.0,
    "m/mlstm/q_proj/bias": 0.0,
    "m/mlstm/proj_down/bias": 0.0,
    "m/xlstm_norm/scale_offset": 0.0,
    "s/xlstm_norm/scale_offset": 0.0,
    "s/ffn_norm/scale_offset": 0.0,
    "s/slstm/group_norm/scale_offset": 0.0,
    "s/slstm/recurrent_kernel": 0.0,
    "M/mlstm/input_gate/kernel": 0.0,
    "M/mlstm/forget_gate/kernel": 0.0,
    "M/mlstm/input_gate/bias": -10.0,
    "M/mlstm/output_gate/kernel": 0.0,
    "M/mlstm/output_gate/bias": 0.0,
    "M/mlstm/multihead_norm/scale": 1.0,
    "M/mlstm/multihead_norm/bias": 0.0,
    "M/norm_mlstm/scale": 1.0,
    "M/norm_ffn/scale": 1.0,
    "out_norm/scale_offset": 0.0,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_parameters_with_constant_initializers(params, name):
    assert np.array_equal(params[name], np.full_like(params[name], CONSTANTS[name]))


def test_forget_biases_cover_a_range_of_time_constants(params):
    for block in "mM":
        np.testing.assert_allclose(params[f"{block}/mlstm/forget_gate/bias"], [[3, 4, 5, 6]])
    assert 0 < np.abs(params["m/mlstm/input_gate/bias"]).max() < 0.4
    bias = params["s/slstm/bias"][0]  # heads, gates, 32 cells of a head
    # Block 1 of 3: exponent 0.3 + 1.3 / 2.
    expected = 5 - 12 * (np.arange(32) / 31) ** 0.95
    np.testing.assert_allclose(bias[:, 1], np.tile(expected, (4, 1)), rtol=1e-5, atol=1e-5)
    assert not bias[:, [0, 2, 3]].any()


def test_options_select_initializers(key):
    slstm = SLSTMConfig(recurrent_init="standard", bias_init="standard")
    params = _params(slstm=slstm, embedding_std=0.5, head_std=0.02)
    assert abs(params["token_embedding/embedding"].std() / 0.5 - 1) < 0.05
    assert abs(params["lm_head/kernel"].std() / 0.02 - 1) < 0.05
    assert not cell_bias_init("zeros", 0, 1)(key, (4, 4, 8)).any()
    for name in ("recurrent_kernel", "bias"):
        leaf, bound = params[f"s/slstm/{name}"], 1 / math.sqrt(DIM)
        assert 0.95 * bound < np.abs(leaf).max() <= bound
        assert abs(leaf.std() * math.sqrt(3) / bound - 1) < 0.15


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**32 - 1])
def test_seeds_of_32_bits_give_the_keys_of_jax(seed, x64):
    with jax.enable_x64(x64):
        key, expected = random_key(seed), jax.random.key(np.uint32(seed))
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))


def test_every_bit_and_the_sign_of_a_seed_count():
    magnitudes = [5, 2**64 + 5, 2**70, 2**70 + 1, 10**400]
    magnitudes += [5 | 1 << bit for bit in range(3, 72, 6)]
    keys = [random_key(sign * n) for n in magnitudes for sign in (1, -1)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


def test_programs_that_run_once_equal_those_of_jit(request):
    # Tests compile at level 0.
    jax.config.update("jax_disable_most_optimizations", False)
    request.addfinalizer(lambda: jax.config.update("jax_disable_most_optimizations", True))
    draw = lambda key: {"a": normal(0.1)(key, (64, 3)), "b": uniform(0.5)(key, (5,))}  # noqa: E731
    equal = functools.partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-6)
    once, key = jit_once(draw), jax.random.key(1)
    expected = jax.jit(draw)(key)
    equal(once(key), expected)
    # Within transformations, also where no argument is traced.
    equal(jax.jit(once)(key), expected)
    equal(jax.jit(lambda: once(key))(), expected)
    equal(jax.tree.map(lambda x: x[0], jax.vmap(once)(key[None])), expected)
    assert jax.vmap(lambda x: x * once(key)["b"])(jnp.ones(2)).shape == (2, 5)
    assert jax.eval_shape(lambda: once(key))["a"].shape == (64, 3)
