"""Parts of the blocks that ablations disable: each equals its equations, and is recorded."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from tests.modules import models
from xlstm_jax import flops, ops
from xlstm_jax.config import ConfigError, from_dict, to_dict
from xlstm_jax.convert.hf import why_not_exportable
from xlstm_jax.modules import (
    BLOCKS,
    LM,
    LargeConfig,
    LMConfig,
    MLSTMConfig,
    SLSTMConfig,
    param_shapes,
    presets,
)
from xlstm_jax.modules.baselines.options import LSTMConfig
from xlstm_jax.modules.mlstm import MLSTMLayer
from xlstm_jax.modules.slstm import SLSTMLayer
from xlstm_jax.ops.dispatch import Call
from xlstm_jax.ops.mlstm.api import IMPLEMENTATIONS as MLSTM
from xlstm_jax.ops.slstm.api import IMPLEMENTATIONS as SLSTM

B, T, H, K, D = 2, 6, 2, 3, 8
SMALL = dict(num_heads=H, inner_dim=2 * H * K, qkv_block_size=3)


def gates_and_inputs(rng, shift=0.0):
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, H, K)), jnp.float32) for _ in range(3))
    i, f = (jnp.asarray(rng.standard_normal((B, T, H)), jnp.float32) for _ in range(2))
    return q, k, v, i + shift, f


@pytest.mark.parametrize(
    "name",
    ["chunkwise", *(pytest.param(n, marks=pytest.mark.slow) for n in ("recurrent", "parallel"))],
)
def test_mlstm_without_stabilizer_is_the_same_until_a_gate_overflows(name, rng):
    """m is a factor of C and n that cancels; without it exp(i) is inf above 88."""

    def run(inputs, stabilize):
        options = dict(stabilize=stabilize, implementation=name, eps=0.0)
        return quick.jit(lambda *x: ops.mlstm(*x, **options))(*inputs)

    inputs = gates_and_inputs(rng)
    (h, state), (expected, stable) = run(inputs, False), run(inputs, True)
    np.testing.assert_allclose(h, expected, rtol=0, atol=3e-6)
    assert (state.m == 0).all() and not (stable.m == 0).all()
    np.testing.assert_allclose(state.n, stable.n * jnp.exp(stable.m)[..., None], 1e-5, 1e-5)
    large = gates_and_inputs(rng, shift=100.0)
    assert np.isfinite(run(large, True)[0]).all()
    assert not np.isfinite(run(large, False)[0]).all()


def test_slstm_without_stabilizer_is_the_same_until_a_gate_overflows(rng):
    r = jnp.asarray(0.3 * rng.standard_normal((H, K, 4, K)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((B, T, 4, H, K)), jnp.float32)
    run = quick.jit(lambda x, r: ops.slstm(x, r, stabilize=False)[0])
    stable = quick.jit(lambda x, r: ops.slstm(x, r)[0])
    np.testing.assert_allclose(run(x, r), stable(x, r), rtol=0, atol=1e-6)
    assert np.isfinite(stable(x.at[:, :, 0].add(100), r)).all()
    assert not np.isfinite(run(x.at[:, :, 0].add(100), r)).all()


def test_implementations_without_this_switch_give_the_reason():
    call = Call(B, T, H, K, K, jnp.dtype(jnp.float32), "cpu", uses=frozenset({"stabilize=False"}))
    assert MLSTM["recurrent"].unsupported(call) is MLSTM["chunkwise"].unsupported(call) is None
    tpu = dataclasses.replace(call, platform="tpu")
    for table in (MLSTM, SLSTM):
        assert table["pallas_tpu"].unsupported(tpu) == "it has no stabilize=False"
    exp = dataclasses.replace(call, uses=call.uses | {"forget_gate='exp'"})
    assert "stabilize=False with forget_gate='exp'" in MLSTM["parallel"].unsupported(exp)
    q = jnp.ones((1, 4, 1, 2))
    with pytest.raises(NotImplementedError, match=r"chunkwise: it has no stabilize=False with"):
        options = dict(forget_gate="exp", stabilize=False, implementation="chunkwise")
        jax.eval_shape(lambda: ops.mlstm(q, q, q, q[..., 0], q[..., 0], **options))


def layer_and_params(layer, x, dtype=np.float64):
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
    return models.perturbed(zeros, dtype=dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "gate", ["forget_gate", pytest.param("input_gate", marks=pytest.mark.slow)]
)
def test_gate_without_a_kernel_is_its_bias(gate, rng):
    x = jnp.asarray(rng.standard_normal((B, T, D)))
    full = MLSTMLayer(MLSTMConfig(**SMALL))
    less = MLSTMLayer(MLSTMConfig(**SMALL, **{f"{gate}_kernel": False}))
    params = layer_and_params(full, x)
    assert params[gate].pop("kernel").shape == (3 * 2 * H * K, H)
    assert jax.tree.map(jnp.shape, layer_and_params(less, x)) == jax.tree.map(jnp.shape, params)
    y, _ = quick.jit(less.apply)({"params": params}, x)
    kernel = jnp.zeros((3 * 2 * H * K, H))
    zero = params | {gate: params[gate] | {"kernel": kernel}}
    np.testing.assert_allclose(y, quick.jit(full.apply)({"params": zero}, x)[0], 0, 1e-12)


@pytest.mark.usefixtures("x64")
def test_without_covariance_update_the_memory_is_the_diagonal(rng):
    """c_t = f c + i k * v, n_t = f n + i k, h = q c / sqrt(K) / max(|q n| / sqrt(K), 1)."""
    x = jnp.asarray(rng.standard_normal((B, T, D)))
    cfg = MLSTMConfig(**SMALL, conv_width=0, covariance_update=False)
    layer = MLSTMLayer(cfg)
    params = layer_and_params(layer, x)
    y, state = quick.jit(layer.apply)({"params": params}, x)
    F, size = 2 * H * K, K * 2
    assert state.cell.C.shape == (B, F, 1, 1)
    a, z = np.split(np.asarray(x @ params["proj_up"]["kernel"]), 2, axis=-1)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    u = a * sigmoid(a)
    project = lambda name, x: np.asarray(  # noqa: E731
        jnp.einsum("BTPI,PIO->BTPO", x.reshape(B, T, -1, 3), params[name]["kernel"])
    ).reshape(B, T, F)
    q, k, v = project("q_proj", u), project("k_proj", u), project("v_proj", a)
    qkv = np.concatenate([q, k, v], axis=-1)
    gate = lambda p: np.asarray(qkv @ p["kernel"] + p["bias"][None, None])  # noqa: E731
    i, f = (np.repeat(gate(params[name]), size, -1) for name in ("input_gate", "forget_gate"))
    c = n = np.zeros((B, F))
    outputs = []
    for t in range(T):
        c = sigmoid(f[:, t]) * c + np.exp(i[:, t]) * k[:, t] * v[:, t]
        n = sigmoid(f[:, t]) * n + np.exp(i[:, t]) * k[:, t]
        outputs.append(q[:, t] * c / size**0.5 / np.maximum(np.abs(q[:, t] * n) / size**0.5, 1))
    h = np.stack(outputs, axis=1).reshape(B, T, H, size)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = h.reshape(B, T, F) * (1 + params["out_norm"]["scale_offset"])[None, None]
    h = (h + params["learnable_skip"][None, None] * u) * z * sigmoid(z)
    np.testing.assert_allclose(y, h @ params["proj_down"]["kernel"], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("x64")
def test_without_memory_mixing_nothing_depends_on_the_last_hidden_state(rng):
    x = jnp.asarray(rng.standard_normal((B, T, D)))
    full, less = (SLSTMLayer(SLSTMConfig(num_heads=H, memory_mixing=on)) for on in (True, False))
    params = layer_and_params(full, x)
    zero = params | {"recurrent_kernel": jnp.zeros_like(params["recurrent_kernel"])}
    del params["recurrent_kernel"]
    assert jax.tree.map(jnp.shape, layer_and_params(less, x)) == jax.tree.map(jnp.shape, params)
    expected = quick.jit(full.apply)({"params": zero}, x)[0]
    np.testing.assert_allclose(quick.jit(less.apply)({"params": params}, x)[0], expected, 0, 1e-12)


@pytest.mark.usefixtures("x64")
def test_large_block_with_an_activation_has_no_gate_in_its_feed_forward_layer(rng):
    sizes = LargeConfig(num_heads=H, ffn_dim=10, ffn_activation="relu2", use_bias=True)
    cfg = LMConfig(vocab_size=2, dim=D, pattern="M", large=sizes)
    block, x = BLOCKS["M"].block(cfg), jnp.asarray(rng.standard_normal((B, T, D)))
    params = layer_and_params(block, x)
    ffn = params["ffn"]
    assert set(ffn) == {"proj_up", "proj_down"}
    zero = params | {"ffn": ffn | {"proj_down": jax.tree.map(jnp.zeros_like, ffn["proj_down"])}}
    run = quick.jit(lambda params: block.apply({"params": params}, x)[0])
    residual = np.asarray(run(zero))
    norm = residual / np.sqrt(np.square(residual).mean(-1, keepdims=True) + 1e-6)
    norm = norm * params["norm_ffn"]["scale"][None, None] + params["norm_ffn"]["bias"][None, None]
    up = norm @ ffn["proj_up"]["kernel"] + ffn["proj_up"]["bias"][None, None]
    down = (
        np.maximum(up, 0) ** 2 @ ffn["proj_down"]["kernel"] + ffn["proj_down"]["bias"][None, None]
    )
    np.testing.assert_allclose(run(params), residual + down, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name, options",
    [
        ("mlstm", dict(stabilize=False)),
        ("mlstm", dict(input_gate_kernel=False, forget_gate_kernel=False)),
        ("mlstm", dict(covariance_update=False)),
        ("slstm", dict(stabilize=False, memory_mixing=False)),
        ("large", dict(input_bias_std=0.5, ffn_activation="relu2", stabilize=False)),
        ("lstm", dict(ffn_dim=0)),
    ],
)
def test_switches_are_counted_and_recorded_only_if_set(name, options):
    letter = {kind.name: letter for letter, kind in BLOCKS.items()}[name]
    letter = "L" if name == "lstm" else letter
    classes = dict(mlstm=MLSTMConfig, slstm=SLSTMConfig, large=LargeConfig, lstm=LSTMConfig)
    default = LMConfig(vocab_size=7, dim=64, pattern=letter)
    cfg = dataclasses.replace(default, **{name: classes[name](**options)})
    values = json.loads(json.dumps(to_dict(cfg)))
    assert from_dict(LMConfig, values) == cfg
    assert {field: values[name][field] for field in options} == options
    if name != "lstm":
        assert not set(options) & set(to_dict(default)[name])
    leaves = jax.tree.leaves(param_shapes(cfg))
    assert flops.count_params(cfg) == sum(leaf.size for leaf in leaves)
    if {"stabilize"} != set(options):
        assert flops.forward_flops(cfg, 8) != flops.forward_flops(default, 8)


def test_models_with_switches_are_not_exported_and_unknown_activations_are_refused():
    for options in (dict(stabilize=False), dict(ffn_activation="relu2")):
        cfg = dataclasses.replace(presets.get("xlstm_7b"), large=LargeConfig(**options))
        assert f"large.{next(iter(options))}=" in why_not_exportable(cfg)
    with pytest.raises(ConfigError, match=r"large\.ffn_activation='tanh' is not known; use one"):
        LargeConfig(ffn_activation="tanh")


@pytest.mark.parametrize("pattern", ["mmmmmmmm", "msmsmsms"])
def test_stack_without_convolution_is_scanned(pattern):
    """The state of its convolution is empty."""
    cfg = LMConfig(
        vocab_size=11,
        dim=8,
        pattern=pattern,
        mlstm=MLSTMConfig(num_heads=2, conv_width=0),
        slstm=SLSTMConfig(num_heads=2, conv_width=0),
    )
    model, tokens = LM(cfg), jnp.arange(12).reshape(2, 6) % 11
    params = model.init(jax.random.key(0), tokens)
    logits, state = quick.jit(model.apply)(params, tokens)
    first, state = quick.jit(model.apply)(params, tokens[:, :4])
    last, _ = quick.jit(model.apply)(params, tokens[:, 4:], state)
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), logits, rtol=1e-4, atol=1e-5)


# arXiv:2405.04517, tables 2 and 8: millions of parameters, as printed.
ABLATIONS = {
    "pre up-projection": ("m" * 48, dict(), 409.3),
    "without convolution": ("m" * 48, dict(mlstm=MLSTMConfig(conv_width=0)), 408.8),
    "post up-projection": (
        "M" * 24,
        dict(
            large=LargeConfig(qk_dim=1024, ffn_dim=4096, ffn_activation="relu2"), final_norm="rms"
        ),
        430.4,
    ),
    "xLSTM[0:1]": ("s" * 24, dict(slstm=SLSTMConfig(ffn_dim=3712)), 427.3),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_have_the_printed_number_of_parameters(name):
    pattern, options, millions = ABLATIONS[name]
    cfg = LMConfig(vocab_size=presets.VOCAB_SIZE, dim=1024, pattern=pattern, **options)
    assert round(flops.count_params(cfg) / 1e6, 1) == millions


def test_residual_lstms_have_the_printed_number_of_parameters_with_two_biases():
    """506.1 million with the two biases of PyTorch's LSTM, of which ours has one."""
    sizes = dict(dim=1024, lstm=LSTMConfig(ffn_dim=0), final_norm="rms")
    cfg = LMConfig(vocab_size=presets.VOCAB_SIZE, pattern="L" * 48, **sizes)
    assert round((flops.count_params(cfg) + 48 * 4 * 1024) / 1e6, 1) == 506.1
