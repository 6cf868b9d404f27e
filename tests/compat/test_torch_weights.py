"""Weights of `torch.nn.LSTM`: equal outputs, and back. The formulas of PyTorch are in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax import compat
from xlstm_jax.errors import ArgumentError, UnsupportedError

B, T, D, F = 3, 6, 3, 4
LENGTHS = [6, 2, 4]

every_shape = pytest.mark.parametrize("num_layers", [1, 2])
every_direction = pytest.mark.parametrize("bidirectional", [False, True])
with_or_without_bias = pytest.mark.parametrize("bias", [True, False])


def state_dict(num_layers, *, bidirectional, bias, seed=0):
    """Random weights under the names of PyTorch."""
    rng, weights = np.random.default_rng(seed), {}
    suffixes = ("", "_reverse") if bidirectional else ("",)
    for index in range(num_layers):
        width = D if index == 0 else F * len(suffixes)
        for suffix in suffixes:
            shapes = {"weight_ih": (4 * F, width), "weight_hh": (4 * F, F)}
            shapes |= {"bias_ih": (4 * F,), "bias_hh": (4 * F,)} if bias else {}
            for name, shape in shapes.items():
                weights[f"{name}_l{index}{suffix}"] = rng.standard_normal(shape).astype(np.float32)
    return weights


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def torch_lstm(weights, x):
    """`torch.nn.LSTM` on one sequence, T D: the outputs, h_n and c_n. From its documentation."""
    h_n, c_n, index = [], [], 0
    while f"weight_ih_l{index}" in weights:
        directions = []
        for suffix in ("", "_reverse"):
            name = f"l{index}{suffix}"
            if f"weight_ih_{name}" not in weights:
                continue
            h, c, outputs = np.zeros(F), np.zeros(F), []
            for x_t in x if not suffix else x[::-1]:
                gates = weights[f"weight_ih_{name}"] @ x_t + weights[f"weight_hh_{name}"] @ h
                gates = gates + weights.get(f"bias_ih_{name}", 0)
                gates = gates + weights.get(f"bias_hh_{name}", 0)
                i, f, g, o = np.split(gates, 4)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                outputs.append(h)
            directions.append(np.stack(outputs if not suffix else outputs[::-1]))
            h_n.append(h)
            c_n.append(c)
        x, index = np.concatenate(directions, axis=-1), index + 1
    return x, np.stack(h_n), np.stack(c_n)


@every_shape
@every_direction
@with_or_without_bias
def test_outputs_and_states_are_those_of_pytorch(num_layers, bidirectional, bias, rng):
    weights = state_dict(num_layers, bidirectional=bidirectional, bias=bias)
    layer, params = compat.from_torch(weights)
    expected = compat.LSTM(D, F, num_layers, bias=bias, bidirectional=bidirectional)
    assert layer == expected
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    y, state = jax.jit(layer.apply)({"params": params}, jnp.asarray(x), lengths=jnp.array(LENGTHS))
    for index, length in enumerate(LENGTHS):
        outputs, h_n, c_n = torch_lstm(weights, x[index, :length])
        np.testing.assert_allclose(y[index, :length], outputs, atol=2e-6)
        np.testing.assert_allclose(state.h_n[:, index], h_n, atol=2e-6)
        np.testing.assert_allclose(state.c_n[:, index], c_n, atol=2e-6)


@every_shape
@every_direction
@with_or_without_bias
def test_weights_written_back_have_the_same_outputs(num_layers, bidirectional, bias, rng):
    weights = state_dict(num_layers, bidirectional=bidirectional, bias=bias)
    _, params = compat.from_torch(weights)
    written = compat.to_torch(params)
    assert {name: a.shape for name, a in written.items()} == {
        name: a.shape for name, a in weights.items()
    }
    for name, array in weights.items():
        if name.startswith("weight"):
            np.testing.assert_array_equal(written[name], array)
    x = rng.standard_normal((T, D))
    np.testing.assert_allclose(torch_lstm(written, x)[0], torch_lstm(weights, x)[0], atol=1e-6)


def test_heads_become_a_block_diagonal_matrix(rng):
    weights = state_dict(2, bidirectional=True, bias=True)
    layer = compat.LSTM(D, F, 2, bidirectional=True, num_heads=2)
    _, params = compat.from_torch(weights)
    for cell in params.values():
        cell["recurrent_kernel"] = rng.standard_normal((2, 2, 4, 2)).astype(np.float32)
        cell["bias"] = rng.standard_normal((2, 4, 2)).astype(np.float32)
    x = rng.standard_normal((1, T, D)).astype(np.float32)
    y, _ = jax.jit(layer.apply)({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(y[0], torch_lstm(compat.to_torch(params), x[0])[0], atol=2e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_package_itself_has_the_same_outputs(bidirectional, rng):
    torch = pytest.importorskip("torch")
    peer = torch.nn.LSTM(D, F, 2, batch_first=True, bidirectional=bidirectional)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    with torch.no_grad():
        expected, (h_n, c_n) = peer(torch.tensor(x))
    layer, params = compat.from_torch(peer.state_dict())
    y, state = layer.apply({"params": params}, jnp.asarray(x))
    for actual, other in ((y, expected), (state.h_n, h_n), (state.c_n, c_n)):
        np.testing.assert_allclose(actual, other.numpy(), atol=2e-6)
    peer.load_state_dict({n: torch.tensor(a) for n, a in compat.to_torch(params).items()})
    with torch.no_grad():
        np.testing.assert_allclose(peer(torch.tensor(x))[0].numpy(), y, atol=2e-6)


BAD = {
    "state_dict must have bias_hh_l0, got only": lambda w: w.pop("bias_hh_l0"),
    "state_dict must have weight_ih_l0, got only": lambda w: w.pop("weight_ih_l0"),
    r"weight_ih_l1 must have the shape \(16, 4\), got \(16, 8\); all entries": lambda w: w.update(
        weight_ih_l1=np.zeros((16, 8))
    ),
    "names such as weight_ih_l0 only, got 'rnn.weight_ih_l0'; pass": lambda w: w.update(
        {"rnn.weight_ih_l0": w.pop("weight_ih_l0")}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_state_dict_that_does_not_fit_is_rejected(message):
    weights = state_dict(2, bidirectional=False, bias=True)
    BAD[message](weights)
    with pytest.raises(ArgumentError, match=message):
        compat.from_torch(weights)


def test_an_empty_state_dict_is_rejected():
    with pytest.raises(ArgumentError, match="state_dict must have weight_hh_l0, got only"):
        compat.from_torch({})


def test_projections_are_not_supported():
    weights = state_dict(1, bidirectional=False, bias=True)
    weights["weight_hr_l0"] = np.zeros((2, F))
    with pytest.raises(UnsupportedError, match="without projections, got 'weight_hr_l0'; train"):
        compat.from_torch(weights)


def test_parameters_of_another_layer_are_rejected():
    layer = compat.MLSTM(D, F)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, D)))["params"]
    with pytest.raises(ArgumentError, match="params must be those of an LSTM.*, got 'l0'; pass"):
        compat.to_torch(params)
