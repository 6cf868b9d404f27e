"""Traces of gates equal those of the cells, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from xlstm_jax import cells, ops
from xlstm_jax.cells import MLSTMState, SLSTMState
from xlstm_jax.cells.mlstm import READ_FLOOR
from xlstm_jax.ops.trace import mlstm_trace, slstm_trace

B, T, H, K, V = 2, 5, 2, 3, 4
RESET = np.zeros((B, T), bool)
RESET[0, 2] = RESET[1, 3] = True
MASK = np.ones((B, T), bool)
MASK[0, 1] = MASK[1, 3] = MASK[1, 4] = False


def _normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def _assert_equal(trace, expected):
    for name, values in expected.items():
        np.testing.assert_allclose(trace[name], np.stack(values, 1), 1e-5, 1e-5, err_msg=name)


def _select(flag, a, b):
    return jnp.where(flag.reshape((B,) + (1,) * (a.ndim - 1)), a, b)


def _steps(step, state):
    """What `step(state, t) -> (state, values)` returns at every position, 0 where masked."""

    @quick.jit
    def run(state):
        steps = []
        for t in range(T):
            reset, mask = RESET[:, t] & MASK[:, t], MASK[:, t]
            before = jax.tree.map(lambda s, r=reset: _select(r, jnp.zeros_like(s), s), state)
            new, values = step(before, t)
            state = jax.tree.map(lambda a, b, m=mask: _select(m, a, b), new, state)
            steps.append([_select(mask, value, jnp.zeros_like(value)) for value in values])
        return list(zip(*steps, strict=True))

    return run(state)


GATES = {
    "default": {},
    "sigmoid input gate": dict(input_gate="sigmoid", normalize=False),
    "exponential forget gate": dict(forget_gate="exp"),
    "scale below the floor": dict(eps=1e-3),
}


@pytest.mark.parametrize("case", GATES)
def test_trace_of_mlstm_equals_that_of_the_cell(case, rng):
    options = GATES[case]
    q, k, v, o = (_normal(rng, B, T, H, size) for size in (K, K, V, V))
    i, f = _normal(rng, B, T, H) - 25 * (case == "scale below the floor"), _normal(rng, B, T, H)
    state = MLSTMState(_normal(rng, B, H, K, V), _normal(rng, B, H, K), _normal(rng, B, H))
    flags = dict(reset=RESET, mask=MASK)
    h, _ = quick.jit(lambda *x: ops.mlstm(*x, **flags, **options))(q, k, v, i, f, state)

    def step(carry, t):
        state, total = carry
        state, _ = cells.mlstm_step(state, q[:, t], k[:, t], v[:, t], i[:, t], f[:, t], **options)
        total = total + (f[:, t] if "forget_gate" in options else jax.nn.log_sigmoid(f[:, t]))
        floored = jnp.maximum(state.m, READ_FLOOR)
        scale = K**-0.5 * jnp.exp(state.m - floored)
        read = scale[..., None] * jnp.einsum("BHK,BHKV->BHV", q[:, t], state.C)
        return (state, total), (state.m, total, read)

    m, total, read = _steps(step, (state, jnp.zeros((B, H))))
    o_flat = o.reshape(B, T, H * V)
    trace = quick.jit(lambda *x: mlstm_trace(*x, **flags, **options))(q, k, i, f, o_flat, state)
    assert set(trace) == {"i", "f", "o", "log_f_sum", "m", "normalizer"}
    _assert_equal(trace, {"m": m, "log_f_sum": total})
    # The normalizer is what the read-out is divided by.
    np.testing.assert_allclose(h * trace["normalizer"][..., None], np.stack(read, 1), 1e-4, 1e-5)
    for name, gate in {"i": i, "f": f, "o": o}.items():
        valid = MASK.reshape(B, T, *(1,) * (gate.ndim - 2))
        np.testing.assert_array_equal(trace[name], np.where(valid, gate, 0))


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_trace_of_slstm_equals_that_of_the_cell(forget_gate, rng):
    x, r, b = _normal(rng, B, T, 4, H, K), _normal(rng, H, K, 4, K), _normal(rng, H, 4, K)
    state = SLSTMState(*(_normal(rng, B, H, K) for _ in range(4)))
    state = state._replace(n=jnp.exp(state.n))

    def step(carry, t):
        state, total = carry
        recurrent = jnp.einsum("BHK,HKGJ->BGHJ", state.h, r) + jnp.swapaxes(b, 0, 1)[None]
        gates = [(x[:, t] + recurrent)[:, n] for n in range(4)]
        state, _ = cells.slstm_step(state, x[:, t], r, b, forget_gate=forget_gate)
        total = total + (gates[1] if forget_gate == "exp" else jax.nn.log_sigmoid(gates[1]))
        return (state, total), (*gates, total, state.m, state.n)

    values = _steps(step, (state, jnp.zeros((B, H, K))))
    options = dict(reset=RESET, mask=MASK, forget_gate=forget_gate)
    trace = quick.jit(lambda *x: slstm_trace(*x, **options))(x, r, b, state)
    names = ["i", "f", "z", "o", "log_f_sum", "m", "normalizer"]
    assert set(trace) == set(names)
    _assert_equal(trace, dict(zip(names, values, strict=True)))
