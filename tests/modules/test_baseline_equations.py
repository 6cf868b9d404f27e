"""Each block of another model equals its equations, written in NumPy as loops over time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules import models
from xlstm_jax.modules import BLOCKS

B, T, D = 2, 9, 16  # longer than every window
CONFIG = models.config(models.MIXED_BASELINES + "l")


def _dense(p, x):
    return x @ p["kernel"] + p.get("bias", np.zeros(p["kernel"].shape[1:]))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu(x):
    return x * _sigmoid(x)


def _softplus(x):
    return np.log1p(np.exp(x))


def _rms_norm(x, p=None, eps=1e-6):
    y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)
    return y if p is None else y * p["scale"]


def _layer_norm(p, x):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * p["scale"] + p.get("bias", 0)


def _unit(x):
    return x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)


def _conv(p, x):
    """Causal, depthwise, with silu."""
    width, y = len(p["kernel"]), np.zeros_like(x)
    for t in range(T):
        for j in range(width):
            if t - (width - 1) + j >= 0:
                y[:, t] += p["kernel"][j] * x[:, t - (width - 1) + j]
    return _silu(y + p.get("bias", 0))


def _heads(x, num_heads):
    return x.reshape(B, T, num_heads, -1)


def _gated_ffn(p, x):
    return _dense(p["proj_down"], _silu(_dense(p["proj_up_gate"], x)) * _dense(p["proj_up"], x))


def _lstm(p, x):
    H, K, _, _ = p["recurrent_kernel"].shape
    gates = _dense(p["proj"], x).reshape(B, T, 4, H, K)
    c = h = np.zeros((B, H, K))
    outputs = []
    for t in range(T):
        recurrent = np.einsum("bhk,hkgj->bghj", h, p["recurrent_kernel"])
        i, f, z, o = np.moveaxis(gates[:, t] + recurrent + p["bias"].swapaxes(0, 1), 1, 0)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(z)
        h = _sigmoid(o) * np.tanh(c)
        outputs.append(h.reshape(B, -1))
    return np.stack(outputs, axis=1)


def _lstm_block(p, x):
    x = x + _lstm(p["lstm"], _layer_norm(p["norm_lstm"], x))
    up = _dense(p["ffn"]["proj_up"], _layer_norm(p["norm_ffn"], x))
    gelu = np.asarray(jax.nn.gelu(jnp.asarray(up), approximate=False))
    return x + _dense(p["ffn"]["proj_down"], gelu)


def _rotate(x, position, dim):
    """x at a position; pairs are features j and j + dim / 2."""
    y, half = x.copy(), dim // 2
    for j in range(half):
        angle = position * 10_000.0 ** (-2 * j / dim)
        a, b = x[..., j], x[..., half + j]
        y[..., j] = a * np.cos(angle) - b * np.sin(angle)
        y[..., half + j] = b * np.cos(angle) + a * np.sin(angle)
    return y


def _attend(q, k, v, window, num_sinks, dim):
    y, per_group = np.zeros_like(q), q.shape[2] // k.shape[2]
    for t in range(T):
        for head in range(q.shape[2]):
            scores, values = [], []
            for u in range(t + 1):
                if t - u >= window and u >= num_sinks:
                    continue
                # A query is never farther from a sink than the cache is long.
                position = min(t, num_sinks + window - 1) if t - u >= window else t
                query = _rotate(q[:, t, head], position, dim)
                key = _rotate(k[:, u, head // per_group], u, dim)
                scores.append((query * key).sum(-1) / np.sqrt(q.shape[-1]))
                values.append(v[:, u, head // per_group])
            weights = np.exp(np.stack(scores))
            weights /= weights.sum(0)
            y[:, t, head] = (weights[..., None] * np.stack(values)).sum(0)
    return y


def _attention_block(cfg):
    def block(p, x):
        layer, y = p["attention"], _rms_norm(x, p["norm_attention"])
        groups = cfg.num_kv_heads or cfg.num_heads
        q, k, v = (
            _heads(_dense(layer[name], y), heads)
            for name, heads in (("q", cfg.num_heads), ("k", groups), ("v", groups))
        )
        if cfg.qk_norm:
            q, k = _rms_norm(q, layer["q_norm"]), _rms_norm(k, layer["k_norm"])
        h = _attend(q, k, v, cfg.window_size, cfg.num_sinks, cfg.rotary_dim(D)).reshape(B, T, -1)
        if cfg.output_gate:
            h = _sigmoid(_dense(layer["output_gate"], y)) * h
        x = x + _dense(layer["out_proj"], h)
        return x + _gated_ffn(p["ffn"], _rms_norm(x, p["norm_ffn"]))

    return block


def _mlstm(q, k, v, i, f):
    """Without a stabilizer: the gates are small."""
    H, K = q.shape[2:]
    C, n, outputs = np.zeros((B, H, K, v.shape[-1])), np.zeros((B, H, K)), []
    for t in range(T):
        forget, write = _sigmoid(f[:, t])[..., None], np.exp(i[:, t])[..., None]
        C = forget[..., None] * C + (write * k[:, t])[..., None] * v[:, t][..., None, :]
        n = forget * n + write * k[:, t]
        query = q[:, t] / np.sqrt(K)
        divisor = np.maximum(np.abs((query * n).sum(-1)), 1)
        outputs.append(np.einsum("bhk,bhkv->bhv", query, C) / divisor[..., None])
    return np.stack(outputs, axis=1)


def _hybrid_block(p, x):
    cfg, layer, y = CONFIG.hybrid, p["hybrid"], _rms_norm(x, p["norm_mixer"])
    q, k, v = (_heads(_dense(layer[name], y), cfg.num_heads) for name in "qkv")
    i, f = (15 * np.tanh(_dense(layer[name], y) / 15) for name in ("input_gate", "forget_gate"))
    h = _mlstm(q, k, v, i, f)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    h = h.reshape(B, T, D) * layer["multihead_norm"]["scale"]
    near = _attend(q, k, v, cfg.window, cfg.num_sinks, D // cfg.num_heads).reshape(B, T, D)
    gate = _sigmoid(_dense(layer["output_gate"], y))
    x = x + _dense(layer["out_proj"], gate * h + (1 - gate) * near)
    return x + _gated_ffn(p["ffn"], _rms_norm(x, p["norm_ffn"]))


def _mamba_block(p, x):
    layer, y = p["mamba"], _rms_norm(x, p["norm"], 1e-5)
    u, z = _conv(layer["conv"], _dense(layer["x"], y)), _dense(layer["gate"], y)
    dt = _softplus(_dense(layer["dt_up"], _dense(layer["dt_down"], u)))
    write, read = _dense(layer["B"], u), _dense(layer["C"], u)
    A, h, outputs = -np.exp(layer["A_log"]), 0.0, []
    for t in range(T):
        h = np.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * write[:, t, None]
        outputs.append((h * read[:, t, None]).sum(-1) + layer["D"] * u[:, t])
    return x + _dense(layer["out_proj"], np.stack(outputs, axis=1) * _silu(z))


def _mamba2_block(p, x):
    cfg, layer, y = CONFIG.mamba2, p["mamba2"], _rms_norm(x, p["norm"], 1e-5)
    u, write, read = (_conv(layer[f"conv_{n}"], _dense(layer[n], y)) for n in ("x", "B", "C"))
    H = cfg.heads(D)
    u = _heads(u, H)
    write, read = (_heads(a, cfg.groups).repeat(H // cfg.groups, axis=2) for a in (write, read))
    dt = _softplus(_dense(layer["dt"], y) + layer["dt_bias"])
    A, h, outputs = -np.exp(layer["A_log"]), 0.0, []
    for t in range(T):
        decay = np.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + dt[:, t, :, None, None] * write[:, t, :, :, None] * u[:, t, :, None]
        outputs.append((h * read[:, t, :, :, None]).sum(2) + layer["D"][:, None] * u[:, t])
    h = np.stack(outputs, axis=1).reshape(B, T, -1) * _silu(_dense(layer["gate"], y))
    h = _rms_norm(_heads(h, cfg.groups), eps=1e-5).reshape(B, T, -1) * layer["norm"]["scale"]
    return x + _dense(layer["out_proj"], h)


def _gated_delta_block(p, x):
    cfg, layer, y = CONFIG.gated_delta, p["gated_delta"], _rms_norm(x, p["norm_mixer"])
    q, k, v = (_conv(layer[f"conv_{n}"], _dense(layer[n], y)) for n in ("q", "k", "v"))
    per_group = cfg.num_heads // cfg.num_qk_heads
    q, k = (_unit(_heads(a, cfg.num_qk_heads)).repeat(per_group, axis=2) for a in (q, k))
    v, beta = _heads(v, cfg.num_heads), _sigmoid(_dense(layer["beta"], y))
    step = _softplus(_dense(layer["decay"], y) + layer["dt_bias"])
    decay = np.exp(-np.exp(layer["A_log"]) * step)
    S, outputs = np.zeros((B, cfg.num_heads, k.shape[-1], v.shape[-1])), []
    for t in range(T):
        S = decay[:, t, :, None, None] * S
        stored = np.einsum("bhk,bhkv->bhv", k[:, t], S)
        change = beta[:, t, :, None] * (v[:, t] - stored)
        S = S + k[:, t][..., None] * change[..., None, :]
        outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t] / np.sqrt(q.shape[-1]), S))
    h = _rms_norm(np.stack(outputs, axis=1), layer["norm"]).reshape(B, T, -1)
    x = x + _dense(layer["out_proj"], h * _silu(_dense(layer["gate"], y)))
    return x + _gated_ffn(p["ffn"], _rms_norm(x, p["norm_ffn"]))


def _mixed(p, name, x):
    before = np.concatenate([np.zeros((B, 1, D)), x[:, :-1]], axis=1)
    share = p[f"mix_{name}"]["share"]
    return _dense(p[name], share * x + (1 - share) * before)


def _rwkv4_block(p, x):
    layer, y = p["time_mix"], _layer_norm(p["norm_time"], x)
    k, v, r = (_mixed(layer, name, y) for name in ("key", "value", "receptance"))
    decay, total, weights, outputs = np.exp(-np.exp(layer["decay"])), 0.0, 0.0, []
    for t in range(T):
        newest = np.exp(k[:, t] + layer["bonus"])
        outputs.append((total + newest * v[:, t]) / (weights + newest))
        total = decay * total + np.exp(k[:, t]) * v[:, t]
        weights = decay * weights + np.exp(k[:, t])
    x = x + _dense(layer["out_proj"], _sigmoid(r) * np.stack(outputs, axis=1))
    layer, y = p["channel_mix"], _layer_norm(p["norm_channel"], x)
    k, r = _mixed(layer, "key", y), _mixed(layer, "receptance", y)
    return x + _sigmoid(r) * _dense(layer["value"], np.maximum(k, 0) ** 2)


EQUATIONS = {
    "l": lambda p, x: _lstm(p["lstm"], x),
    "L": _lstm_block,
    "a": _attention_block(CONFIG.attention),
    "w": _attention_block(CONFIG.window),
    "h": _hybrid_block,
    "b": _mamba_block,
    "B": _mamba2_block,
    "d": _gated_delta_block,
    "r": _rwkv4_block,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("letter", models.BASELINES)
def test_block_equals_its_equations(letter, rng):
    x = rng.standard_normal((B, T, D))
    block = BLOCKS[letter].block(CONFIG)
    shapes = jax.eval_shape(block.init, jax.random.key(0), jnp.asarray(x))["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
    params = models.perturbed(zeros, dtype=np.float64)
    y, _ = jax.jit(block.apply)({"params": params}, jnp.asarray(x))
    expected = EQUATIONS[letter](jax.tree.map(np.asarray, params), x)
    # The mLSTM adds 1e-6 to its normalizer.
    tolerance = 1e-5 if letter == "h" else 1e-9
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)


def test_every_baseline_has_equations():
    assert EQUATIONS.keys() == set(models.BASELINES)
