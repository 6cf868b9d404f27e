"""Cells: the formulas of the papers, argument order of `scan`, `jit`, `vmap` and `grad`."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cells import naive
from tests.quick import jit
from xlstm_jax import cells

B, T, H, K, V = 2, 11, 2, 4, 3


class Cell(NamedTuple):
    """A cell, its scan, and the reference formula."""

    scan: object
    step: object
    formula: object
    options: dict


CELLS = {
    "lstm": Cell(cells.lstm_scan, cells.lstm_step, naive.lstm, {}),
    "slstm": Cell(cells.slstm_scan, cells.slstm_step, naive.slstm, {}),
    "slstm_exp": Cell(cells.slstm_scan, cells.slstm_step, naive.slstm, {"forget_gate": "exp"}),
    "mlstm": Cell(cells.mlstm_scan, cells.mlstm_step, naive.mlstm, {}),
    "mlstm_exp": Cell(cells.mlstm_scan, cells.mlstm_step, naive.mlstm, {"forget_gate": "exp"}),
    "mlstm_swapped": Cell(
        cells.mlstm_scan,
        cells.mlstm_step,
        naive.mlstm,
        {"input_gate": "sigmoid", "forget_gate": "exp"},
    ),
    "mlstm_sigmoid": Cell(
        cells.mlstm_scan, cells.mlstm_step, naive.mlstm, {"input_gate": "sigmoid"}
    ),
    "mlstm_unnormalized": Cell(
        cells.mlstm_scan,
        cells.mlstm_step,
        naive.mlstm,
        {"input_gate": "sigmoid", "normalize": False},
    ),
}
every_cell = pytest.mark.parametrize("name", CELLS)
# For tests of transformations, whose result does not depend on the options of a cell.
default_cells = pytest.mark.parametrize("name", ["lstm", "slstm", "mlstm"])


def inputs_of(name, rng):
    """Sequences `B T ...`, weights, and a state that is not the initial one."""
    normal = rng.standard_normal
    if name.startswith("mlstm"):
        sequences = [normal((B, T, H, K)), normal((B, T, H, K)), normal((B, T, H, V))]
        sequences += [normal((B, T, H)), normal((B, T, H)) + 1]
        m = normal((B, H)) if name == "mlstm" else np.zeros((B, H))
        return sequences, [], cells.MLSTMState(normal((B, H, K, V)), normal((B, H, K)), m)
    sequences = [normal((B, T, 4, H, K))]
    weights = [0.5 * normal((H, K, 4, K)), normal((H, 4, K))]
    c, h, m = (normal((B, H, K)) for _ in range(3))
    if name == "lstm":
        return sequences, weights, cells.LSTMState(c, h)
    return sequences, weights, cells.SLSTMState(c, 1 + normal((B, H, K)) ** 2, h, m)


def unscaled(state) -> list[np.ndarray]:
    """Leaves of the state without m, times exp(m)."""
    scale = np.exp(getattr(state, "m", np.zeros(())))
    leaves = state._asdict()
    leaves.pop("m", None)
    times = lambda x: x * scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))  # noqa: E731
    return [leaf if name == "h" else times(leaf) for name, leaf in leaves.items()]


def run_formula(name, sequences, weights, state, reset, mask):
    """h `B T H ...` and the unscaled state after the last step, one head at a time."""
    cell = CELLS[name]
    h = [[None] * H for _ in range(B)]
    last = [[None] * H for _ in range(B)]
    state = unscaled(state)
    for b in range(B):
        for head in range(H):
            w = [x[head] for x in weights]
            inputs = [s[b, :, :, head] if s.ndim == 5 else s[b, :, head] for s in sequences]
            step = lambda s, *x, w=w: cell.formula(s, *x, *w, **cell.options)  # noqa: E731
            initial = tuple(leaf[b, head] for leaf in state)
            steps = list(zip(*inputs, strict=True))
            h[b][head], last[b][head] = naive.run(step, initial, steps, reset[b], mask[b])
    h = np.moveaxis(np.array(h), 1, 2)
    leaves = [np.array([[s[i] for s in heads] for heads in last]) for i in range(len(state))]
    return h, leaves


@pytest.mark.parametrize(
    "name,flags",
    [*((name, True) for name in CELLS), *((name, False) for name in ("lstm", "slstm", "mlstm"))],
)
def test_scan_matches_the_formula_of_the_paper(name, flags, rng, x64):
    sequences, weights, state = inputs_of(name, rng)
    reset = rng.random((B, T)) < 0.3 * flags
    mask = rng.random((B, T)) >= 0.3 * flags
    mask[:, -1] = True
    expected_h, expected = run_formula(name, sequences, weights, state, reset, mask)
    options = dict(CELLS[name].options, **({"eps": 0.0} if name.startswith("mlstm") else {}))
    if flags:
        options |= {"reset": jnp.asarray(reset), "mask": jnp.asarray(mask)}
    arrays = jax.tree.map(jnp.asarray, (sequences, weights, state))
    scan = jit(functools.partial(CELLS[name].scan, **options))
    h, last = scan(*arrays[0], *arrays[1], arrays[2])
    np.testing.assert_allclose(h, expected_h, rtol=1e-12, atol=1e-13)
    for leaf, expected_leaf in zip(unscaled(last), expected, strict=True):
        np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-12, atol=1e-13)


@functools.cache
def jitted_scan(name, **options):
    return jit(functools.partial(CELLS[name].scan, **CELLS[name].options, **options))


@every_cell
def test_lax_scan_of_the_step_equals_the_scan_function(name, rng):
    sequences, weights, state = jax.tree.map(jnp.float32, inputs_of(name, rng))
    cell = CELLS[name]

    def body(state, inputs_t):
        return cell.step(state, *inputs_t, *weights, **cell.options)

    time_first = [jnp.moveaxis(x, 1, 0) for x in sequences]
    last, h = jit(lambda s, x: jax.lax.scan(body, s, x))(state, time_first)
    expected_h, expected = jitted_scan(name)(*sequences, *weights, state)
    actual = jnp.moveaxis(h, 0, 1), last
    chex.assert_trees_all_close(actual, (expected_h, expected), rtol=1e-5, atol=1e-6)


@default_cells
def test_reverse_scan_equals_the_scan_of_flipped_inputs(name, rng):
    sequences, weights, state = jax.tree.map(jnp.float32, inputs_of(name, rng))
    h, last = jitted_scan(name, reverse=True)(*sequences, *weights, state)
    flipped = [jnp.flip(x, 1) for x in sequences]
    expected_h, expected = jitted_scan(name)(*flipped, *weights, state)
    actual = jnp.flip(h, 1), last
    chex.assert_trees_all_close(actual, (expected_h, expected), rtol=1e-5, atol=1e-6)


@default_cells
def test_step_composes_with_jit_vmap_and_grad(name, rng):
    sequences, weights, state = jax.tree.map(jnp.float32, inputs_of(name, rng))
    inputs_t = [x[:, 0] for x in sequences]
    cell = CELLS[name]

    def loss(state, inputs_t, weights):
        next_state, h = cell.step(state, *inputs_t, *weights, **cell.options)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in (h, *next_state))

    # Each sequence is a batch of one under vmap; weights are shared.
    grad = jax.grad(loss, argnums=(0, 1))
    examples = jax.tree.map(lambda x: x[:, None], (state, inputs_t))
    mapped = jit(jax.vmap(grad, (0, 0, None)))(*examples, weights)
    batched = jit(grad)(state, inputs_t, weights)
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(batched), strict=True):
        np.testing.assert_allclose(a[:, 0], b, rtol=1e-4, atol=1e-5)
        assert np.isfinite(a).all() and np.any(a)


@pytest.mark.parametrize(
    "init,sizes,state",
    [
        (cells.lstm_init, (B, H, K), cells.LSTMState),
        (cells.slstm_init, (B, H, K), cells.SLSTMState),
        (cells.mlstm_init, (B, H, K, V), cells.MLSTMState),
    ],
)
def test_initial_state_is_zero_in_every_leaf(init, sizes, state):
    initial = init(*sizes)
    assert isinstance(initial, state)
    for leaf in initial:
        assert leaf.dtype == jnp.float32 and leaf.shape[:2] == (B, H) and not leaf.any()


@default_cells
def test_state_none_equals_the_initial_state(name, rng):
    sequences, weights, state = jax.tree.map(jnp.float32, inputs_of(name, rng))
    zeros = jax.tree.map(jnp.zeros_like, state)
    from_zeros = jitted_scan(name)(*sequences, *weights, zeros)
    from_none = jitted_scan(name)(*sequences, *weights)
    jax.tree.map(np.testing.assert_array_equal, from_zeros, from_none)


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_slstm_stabilizer_of_the_first_step_is_the_input_gate(forget_gate, rng):
    """Also where exp(log f - i) overflows: values are those of m = i, gradients are finite."""
    r = jnp.asarray(rng.standard_normal((H, K, 4, K)), jnp.float32)
    initial = cells.slstm_init(B, H, K)._replace(m=jnp.full((B, H, K), 50.0))

    def loss(state, x, r):
        state, h = cells.slstm_step(state, x, r, forget_gate=forget_gate)
        return jnp.sum(h * h) + jnp.sum(state.c), state

    grad = jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    for gate_i in (-87.0, -200.0, -1e4):
        x = jnp.asarray(rng.standard_normal((B, 4, H, K)), jnp.float32).at[:, 0].set(gate_i)
        grads, state = grad(initial, x, r)
        np.testing.assert_array_equal(state.m, x[:, 0])
        np.testing.assert_array_equal(state.n, 1)
        chex.assert_tree_all_finite(grads)
        assert not grads[0].m.any() and not grads[1][:, 1].any()


def test_mlstm_stabilizer_starts_at_zero():
    """m is 0 before the first step, so m is log f if the input gate is very negative."""
    state = cells.mlstm_init(1, 1, 2, 2)
    ones, gate = jnp.ones((1, 1, 2)), jnp.full((1, 1), -30.0)
    state, h = jit(cells.mlstm_step)(state, ones, ones, ones, gate, jnp.full((1, 1), 2.0))
    np.testing.assert_allclose(state.m, jax.nn.log_sigmoid(2.0).reshape(1, 1), rtol=1e-6)
    np.testing.assert_allclose(h, 2**0.5 * np.exp(-30.0) * np.ones((1, 1, 2)), rtol=1e-5)


def test_mlstm_read_out_of_a_state_below_the_floor_of_m():
    """Both gates near e^-40: h is that of the recurrence without a stabilizer."""
    rng = np.random.default_rng(0)
    T, K, V = 5, 3, 4
    q, k, v = (rng.standard_normal((1, T, 1, size)) for size in (K, K, V))
    i, f = rng.standard_normal((2, 1, T, 1)) - 40
    with jax.enable_x64(True):
        h, state = jit(cells.mlstm_scan)(*map(jnp.asarray, (q, k, v, i, f)))
        assert np.all(state.m < -20) and h.dtype == jnp.float64
    C, n = np.zeros((K, V)), np.zeros(K)
    for t in range(T):
        forget, write = 1 / (1 + np.exp(-f[0, t, 0])), np.exp(i[0, t, 0])
        C = forget * C + write * np.outer(k[0, t, 0], v[0, t, 0])
        n = forget * n + write * k[0, t, 0]
        query = q[0, t, 0] / np.sqrt(K)
        expected = query @ C / max(abs(query @ n), 1)
        np.testing.assert_allclose(h[0, t, 0], expected, rtol=1e-6)
