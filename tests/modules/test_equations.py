"""Each block equals its equations, written in NumPy with the reference cells of the library."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules import models
from xlstm_jax import cells
from xlstm_jax.modules import BLOCKS, LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig

B, T, D, H = 2, 5, 16, 2
CONFIG = LMConfig(
    vocab_size=2,
    dim=D,
    pattern="msM",
    mlstm=MLSTMConfig(num_heads=H, inner_dim=24, qkv_block_size=3, conv_width=3, use_bias=True),
    slstm=SLSTMConfig(num_heads=H, conv_width=2, ffn_dim=20, ffn_activation="relu", ffn_bias=True),
    large=LargeConfig(
        num_heads=H, qk_dim=12, v_dim=20, ffn_dim=28, use_bias=True, gate_soft_cap=2.0
    ),
)


def _expand(vector):
    return vector[None, None]


def _dense(p, x):
    y = x @ p["kernel"]
    return y + _expand(p["bias"]) if "bias" in p else y


def _headwise(p, x):
    groups = np.split(x, len(p["kernel"]), axis=-1)
    y = np.concatenate([g @ k for g, k in zip(groups, p["kernel"], strict=True)], axis=-1)
    return y + _expand(p["bias"]) if "bias" in p else y


def _conv(p, x):
    width = len(p["kernel"])
    padded = np.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
    return sum(padded[:, j : j + T] * _expand(p["kernel"][j]) for j in range(width)) + _expand(
        p["bias"]
    )


def _standardize(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def _layer_norm(p, x):
    return _standardize(x, 1e-5) * _expand(1 + p["scale_offset"])


def _rms_norm(p, x):
    y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    return y * _expand(p["scale"]) + _expand(p["bias"])


def _split_heads(x):
    return x.reshape(B, T, H, -1)


def _merge_heads(h):
    return np.asarray(h).reshape(B, T, -1)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu(x):
    return x * _sigmoid(x)


def _mlstm_block(p, x):
    layer, y = p["mlstm"], _layer_norm(p["xlstm_norm"], x)
    a, z = np.split(_dense(layer["proj_up"], y), 2, axis=-1)
    u = _silu(_conv(layer["conv"], a))
    q, k = (_headwise(layer[name], u) for name in ("q_proj", "k_proj"))
    v = _headwise(layer["v_proj"], a)
    qkv = np.concatenate([q, k, v], axis=-1)
    i, f = (_dense(layer[name], qkv) for name in ("input_gate", "forget_gate"))
    h, _ = cells.mlstm_scan(
        *map(jnp.asarray, (_split_heads(q), _split_heads(k), _split_heads(v), i, f))
    )
    h = _merge_heads(_standardize(np.asarray(h), 1e-5)) * _expand(
        1 + layer["out_norm"]["scale_offset"]
    )
    h = (h + _expand(layer["learnable_skip"]) * u) * _silu(z)
    return x + _dense(layer["proj_down"], h)


def _slstm_block(p, x):
    layer, y = p["slstm"], _layer_norm(p["xlstm_norm"], x)
    u = _silu(_conv(layer["conv"], y))
    inputs = {"input_gate": u, "forget_gate": u, "cell_input": y, "output_gate": y}
    gates = np.stack(
        [_split_heads(_headwise(layer[name], g)) for name, g in inputs.items()], axis=2
    )
    h, _ = cells.slstm_scan(*map(jnp.asarray, (gates, layer["recurrent_kernel"], layer["bias"])))
    scale = _expand(1 + layer["group_norm"]["scale_offset"])
    x = x + _merge_heads(_standardize(np.asarray(h), 1e-5)) * scale
    gate, linear = np.split(_dense(p["ffn"]["proj_up"], _layer_norm(p["ffn_norm"], x)), 2, axis=-1)
    return x + _dense(p["ffn"]["proj_down"], np.maximum(gate, 0) * linear)


def _large_block(p, x):
    layer, y = p["mlstm"], _rms_norm(p["norm_mlstm"], x)
    q, k, v = (_split_heads(_dense(layer[name], y)) for name in "qkv")
    i, f = (2 * np.tanh(_dense(layer[name], y) / 2) for name in ("input_gate", "forget_gate"))
    h, _ = cells.mlstm_scan(*map(jnp.asarray, (q, k, v, i, f)))
    norm = layer["multihead_norm"]
    h = _merge_heads(_standardize(np.asarray(h), 1e-6)) * _expand(norm["scale"]) + _expand(
        norm["bias"]
    )
    x = x + _dense(layer["out_proj"], _sigmoid(_dense(layer["output_gate"], y)) * h)
    y = _rms_norm(p["norm_ffn"], x)
    gate, up = (_dense(p["ffn"][name], y) for name in ("proj_up_gate", "proj_up"))
    return x + _dense(p["ffn"]["proj_down"], _silu(gate) * up)


EQUATIONS = {"m": _mlstm_block, "s": _slstm_block, "M": _large_block}


def _run(letter, cfg, x):
    block = BLOCKS[letter].block(cfg)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
    params = models.perturbed(zeros, dtype=np.float64)
    y, _ = jax.jit(block.apply)({"params": params}, x)
    return np.asarray(y), jax.tree.map(np.asarray, params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("letter", EQUATIONS)
def test_block_equals_its_equations(letter, rng):
    x = rng.standard_normal((B, T, D))
    y, params = _run(letter, CONFIG, jnp.asarray(x))
    np.testing.assert_allclose(y, EQUATIONS[letter](params, x), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_convolution_of_width_0_has_no_parameters_and_of_width_1_no_state(rng):
    x = jnp.asarray(rng.standard_normal((B, T, D)))
    for letter, field in (("m", "mlstm"), ("s", "slstm")):
        for width in (0, 1):
            sizes = dataclasses.replace(getattr(CONFIG, field), conv_width=width)
            cfg = dataclasses.replace(CONFIG, **{field: sizes})
            y, params = _run(letter, cfg, x)
            assert ("conv" in params[field]) == bool(width)
            assert np.isfinite(y).all()
            state = BLOCKS[letter].block(cfg).init_state(B)
            assert state.conv.shape[:2] == (B, 0)


@pytest.mark.usefixtures("x64")
def test_feed_forward_of_width_0_has_no_parameters(rng):
    cfg = dataclasses.replace(CONFIG, slstm=SLSTMConfig(num_heads=H, ffn_dim=0))
    _, params = _run("s", cfg, jnp.asarray(rng.standard_normal((B, T, D))))
    assert set(params) == {"xlstm_norm", "slstm"}
