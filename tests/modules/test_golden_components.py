"""Components and deterministic initializers against golden vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden_files import assert_matches, load
from xlstm_jax.modules import initializers
from xlstm_jax.modules.conv import CausalConv
from xlstm_jax.modules.feedforward import ACTIVATIONS, GatedFeedForward
from xlstm_jax.modules.linear import HeadwiseDense
from xlstm_jax.modules.norm import LayerNorm, MultiHeadNorm
from xlstm_jax.modules.options import first_generation_width, large_width
from xlstm_jax.modules.slstm import cell_bias_init

TOLERANCE = 2e-5  # relative to the array's maximum; these results are float32


@pytest.fixture
def parts() -> dict[str, jax.Array]:
    return {name: jnp.asarray(a) for name, a in load("v1_components").arrays.items()}


def _apply(module, params, *args):
    return module.apply({"params": params}, *args)


def test_convolution_and_its_state_match(parts):
    x = parts["input/x"]
    params = {
        "kernel": parts["conv/param/weight"][:, 0].T,
        "bias": parts["conv/param/bias"],
    }
    conv = CausalConv(4)
    first, state = _apply(conv, params, x[:, :4])
    second, _ = _apply(conv, params, x[:, 4:], state)
    assert_matches(state, parts["conv/state_after_half"], 0.0, "state")
    y = np.concatenate([first, second], axis=1)
    assert_matches(y, parts["conv/output"], TOLERANCE, "y")


def test_convolution_that_mixes_channels_matches(parts):
    params = {
        "kernel": parts["conv_mixing/param/weight"].transpose(2, 1, 0),
        "bias": parts["conv_mixing/param/bias"],
    }
    y, _ = _apply(CausalConv(3, mixing=True), params, parts["input/x"])
    assert_matches(y, parts["conv_mixing/output"], TOLERANCE, "y")


def test_layer_norm_matches(parts):
    params = {
        "scale_offset": parts["layer_norm/param/weight"],
        "bias": parts["layer_norm/param/bias"],
    }
    y = _apply(LayerNorm(use_bias=True), params, parts["input/x"])
    assert_matches(y, parts["layer_norm/output"], TOLERANCE, "y")


def test_multi_head_norm_matches(parts):
    h = parts["multi_head_norm/input"].swapaxes(1, 2)
    params = {"scale_offset": parts["multi_head_norm/param/weight"]}
    y = _apply(MultiHeadNorm(1e-5, as_offset=True), params, h)
    expected = parts["multi_head_norm/output"].swapaxes(1, 2).reshape(y.shape)
    assert_matches(y, expected, TOLERANCE, "y")


@pytest.mark.parametrize("name, features", [("headwise", 24), ("headwise_expand2", 48)])
def test_headwise_dense_matches(parts, name, features):
    params = {"kernel": parts[f"{name}/param/weight"].swapaxes(1, 2)}
    if f"{name}/param/bias" in parts:
        params["bias"] = parts[f"{name}/param/bias"]
    layer = HeadwiseDense(features, 4, initializers.zeros, use_bias="bias" in params)
    y = _apply(layer, params, parts["input/x"])
    assert_matches(y, parts[f"{name}/output"], TOLERANCE, "y")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_feed_forward_matches_with_every_activation(parts, activation):
    params = {
        name: {"kernel": parts[f"ffn/param/{name}.weight"].T} for name in ("proj_up", "proj_down")
    }
    layer = GatedFeedForward(64, 1, activation)
    y = _apply(layer, params, parts["input/x"])
    assert_matches(y, parts[f"ffn/output_{activation}"], TOLERANCE, "y")


def test_power_law_cell_bias_matches_for_every_block(key):
    golden = load("init_constants").under("slstm_bias_powerlaw/num_blocks_")
    assert len(golden) == 11
    for name, expected in golden.items():
        num_blocks, block = (int(word) for word in name.split("/block_"))
        # An array, as under the vmap that initializes blocks.
        init = cell_bias_init("powerlaw_blockdependent", jnp.asarray(block), num_blocks)
        bias = init(key, (3, 4, 8))
        assert_matches(bias, expected, TOLERANCE, name)


def test_small_init_cell_bias_matches(key):
    bias = cell_bias_init("small_init", 0, 1)(key, (3, 4, 8))
    assert_matches(bias, load("init_constants").arrays["slstm_bias_small_init"], TOLERANCE, "bias")


def test_initial_forget_bias_matches_for_any_number_of_heads(key):
    golden = load("init_constants").under("mlstm_fgate_bias/heads_")
    assert set(golden) == {"1", "2", "4", "8"}
    for heads, expected in golden.items():
        bias = initializers.linspace(3.0, 6.0)(key, (int(heads),))
        assert_matches(bias, expected, TOLERANCE, heads)


@pytest.mark.parametrize(
    "rule, width", [("v1_proj_up_dim", first_generation_width), ("large_up_proj_dim", large_width)]
)
def test_widths_are_rounded_as_in_the_reference(rule, width):
    golden = load("init_constants")
    dims = golden.arrays["rounding/embedding_dims"].tolist()
    widths = golden.under(f"rounding/{rule}/factor_")
    assert widths
    for factor, expected in widths.items():
        assert [width(dim, float(factor)) for dim in dims] == expected.tolist()


def test_head_of_width_1_has_the_first_bias_of_the_power_law(key):
    bias = cell_bias_init("powerlaw_blockdependent", 1, 2)(key, (3, 4, 1))
    assert jnp.array_equal(bias[:, 1], jnp.full((3, 1), 5.0))
