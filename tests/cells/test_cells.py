"""The cells against the papers' formulas, and as functions: scan order, jit, vmap, grad."""

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
    """One cell, its scan and the formula it must equal."""

    scan: object
    step: object
    formula: object
    options: dict


CELLS = {
    "lstm": Cell(cells.lstm_scan, cells.lstm_step, naive.lstm, {}),
    "slstm": Cell(cells.slstm_scan, cells.slstm_step, naive.slstm, {}),
    "slstm_exp": Cell(cells.slstm_scan, cells.slstm_step, naive.slstm, {"forget_gate": "exp"}),
    "mlstm": Cell(cells.mlstm_scan, cells.mlstm_step, naive.mlstm, {}),
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
# Options of a cell do not change what `jax` does with it.
each_kind = pytest.mark.parametrize("name", ["lstm", "slstm", "mlstm"])


def inputs_of(name, rng):
    """Sequences `B T ...`, weights, and a state that is not empty."""
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


def memory_of(state) -> list[np.ndarray]:
    """Leaves of the true memory: what the state holds, times exp(m)."""
    scale = np.exp(getattr(state, "m", np.zeros(())))
    leaves = state._asdict()
    leaves.pop("m", None)
    times = lambda x: x * scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))  # noqa: E731
    return [leaf if name == "h" else times(leaf) for name, leaf in leaves.items()]


def by_formula(name, sequences, weights, state, reset, mask):
    """h `B T H ...` and the memory after the last step, head by head."""
    cell = CELLS[name]
    h = [[None] * H for _ in range(B)]
    last = [[None] * H for _ in range(B)]
    memory = memory_of(state)
    for b in range(B):
        for head in range(H):
            own = [w[head] for w in weights]
            heads = [s[b, :, :, head] if s.ndim == 5 else s[b, :, head] for s in sequences]
            step = lambda m, *x, own=own: cell.formula(m, *x, *own, **cell.options)  # noqa: E731
            start = tuple(leaf[b, head] for leaf in memory)
            steps = list(zip(*heads, strict=True))
            h[b][head], last[b][head] = naive.run(step, start, steps, reset[b], mask[b])
    h = np.moveaxis(np.array(h), 1, 2)
    leaves = [np.array([[row[i] for row in rows] for rows in last]) for i in range(len(memory))]
    return h, leaves


@pytest.mark.parametrize(
    "name,flags",
    [*((name, True) for name in CELLS), *((name, False) for name in ("lstm", "slstm", "mlstm"))],
)
def test_the_scan_equals_the_formula_of_the_paper(name, flags, rng, x64):
    sequences, weights, state = inputs_of(name, rng)
    reset = rng.random((B, T)) < 0.3 * flags
    mask = rng.random((B, T)) >= 0.3 * flags
    mask[:, -1] = True
    expected_h, expected = by_formula(name, sequences, weights, state, reset, mask)
    options = dict(CELLS[name].options, **({"eps": 0.0} if name.startswith("mlstm") else {}))
    if flags:
        options |= {"reset": jnp.asarray(reset), "mask": jnp.asarray(mask)}
    arrays = jax.tree.map(jnp.asarray, (sequences, weights, state))
    scan = jit(functools.partial(CELLS[name].scan, **options))
    h, last = scan(*arrays[0], *arrays[1], arrays[2])
    np.testing.assert_allclose(h, expected_h, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(memory_of(last), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


@functools.cache
def jitted_scan(name, **options):
    return jit(functools.partial(CELLS[name].scan, **CELLS[name].options, **options))


@every_cell
def test_steps_in_scan_order_equal_the_scan(name, rng):
    """`jax.lax.scan(step, state, inputs)` works as it stands; the scan is no more than that."""
    sequences, weights, state = jax.tree.map(jnp.float32, inputs_of(name, rng))
    cell = CELLS[name]

    def body(state, now):
        return cell.step(state, *now, *weights, **cell.options)

    time_first = [jnp.moveaxis(x, 1, 0) for x in sequences]
    last, h = jit(lambda s, x: jax.lax.scan(body, s, x))(state, time_first)
    expected_h, expected = jitted_scan(name)(*sequences, *weights, state)
    found = jnp.moveaxis(h, 0, 1), last
    chex.assert_trees_all_close(found, (expected_h, expected), rtol=1e-5, atol=1e-6)


@each_kind
def test_reverse_runs_from_the_last_step_to_the_first(name, rng):
    sequences, weights, state = jax.tree.map(jnp.float32, inputs_of(name, rng))
    h, last = jitted_scan(name, reverse=True)(*sequences, *weights, state)
    flipped = [jnp.flip(x, 1) for x in sequences]
    expected_h, expected = jitted_scan(name)(*flipped, *weights, state)
    found = jnp.flip(h, 1), last
    chex.assert_trees_all_close(found, (expected_h, expected), rtol=1e-5, atol=1e-6)


@each_kind
def test_a_step_can_be_jitted_mapped_and_differentiated_at_once(name, rng):
    sequences, weights, state = jax.tree.map(jnp.float32, inputs_of(name, rng))
    now = [x[:, 0] for x in sequences]
    cell = CELLS[name]

    def loss(state, now, weights):
        new, h = cell.step(state, *now, *weights, **cell.options)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in (h, *new))

    # Each batch row as a batch of its own, under vmap; weights shared.
    grad = jax.grad(loss, argnums=(0, 1))
    rows = jax.tree.map(lambda x: x[:, None], (state, now))
    mapped = jit(jax.vmap(grad, (0, 0, None)))(*rows, weights)
    together = jit(grad)(state, now, weights)
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(together), strict=True):
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
def test_the_initial_state_is_zeros_in_every_leaf(init, sizes, state):
    empty = init(*sizes)
    assert isinstance(empty, state)
    for leaf in empty:
        assert leaf.dtype == jnp.float32 and leaf.shape[:2] == (B, H) and not leaf.any()


@each_kind
def test_the_initial_state_and_none_are_the_same(name, rng):
    sequences, weights, state = jax.tree.map(jnp.float32, inputs_of(name, rng))
    zeros = jax.tree.map(jnp.zeros_like, state)
    given = jitted_scan(name)(*sequences, *weights, zeros)
    none = jitted_scan(name)(*sequences, *weights)
    jax.tree.map(np.testing.assert_array_equal, given, none)


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_the_first_slstm_step_takes_its_scale_from_the_input_gate_alone(forget_gate, rng):
    """Also where exp(log f - i) overflows: values are those of m = i, gradients finite."""
    r = jnp.asarray(rng.standard_normal((H, K, 4, K)), jnp.float32)
    first = cells.slstm_init(B, H, K)._replace(m=jnp.full((B, H, K), 50.0))

    def loss(state, x, r):
        new, h = cells.slstm_step(state, x, r, forget_gate=forget_gate)
        return jnp.sum(h * h) + jnp.sum(new.c), new

    slope = jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    for gate_i in (-87.0, -200.0, -1e4):
        x = jnp.asarray(rng.standard_normal((B, 4, H, K)), jnp.float32).at[:, 0].set(gate_i)
        gradients, new = slope(first, x, r)
        np.testing.assert_array_equal(new.m, x[:, 0])
        np.testing.assert_array_equal(new.n, 1)
        chex.assert_tree_all_finite(gradients)
        assert not gradients[0].m.any() and not gradients[1][:, 1].any()


def test_the_mlstm_starts_from_a_scale_of_one():
    """m is 0 before the first step, so very negative input gates leave it at log f."""
    state = cells.mlstm_init(1, 1, 2, 2)
    ones, gate = jnp.ones((1, 1, 2)), jnp.full((1, 1), -30.0)
    new, h = jit(cells.mlstm_step)(state, ones, ones, ones, gate, jnp.full((1, 1), 2.0))
    np.testing.assert_allclose(new.m, jax.nn.log_sigmoid(2.0).reshape(1, 1), rtol=1e-6)
    np.testing.assert_allclose(h, 2**0.5 * np.exp(-30.0) * np.ones((1, 1, 2)), rtol=1e-5)
