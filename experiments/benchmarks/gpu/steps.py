"""Checks of decode steps through layers whose states are stacked, against the reference.

XLA of jax 0.11 fuses a kernel with the slices of stacked states, which is wrong for a kernel that
updates its input in place. So each check runs with dynamic-slice fusion and without it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu.errors import relative_error
from experiments.benchmarks.gpu.report import Record
from experiments.benchmarks.gpu.settings import Settings, reference
from xlstm_jax import cells, ops

TOKENS = 2
Step = Callable[..., tuple[jax.Array, Any]]


class Decoding(NamedTuple):
    """Inputs of `TOKENS` decode steps through stacked layers, and the step of one layer."""

    states: Any  # leaves "layers B ..."
    tokens: tuple[jax.Array, ...]  # arguments of the first layer, "tokens B 1 ..."
    zero: jax.Array  # input of the first layer, where others have h of the previous layer
    step: Step  # (implementation, h of the previous layer, token, state) -> (h, state)


def check_stacked_steps(
    op: str, settings: Settings, *, fusion: bool | None, unroll: bool
) -> Record:
    """Errors of h and of the state against the reference, and changes of the input states.

    The inputs are not donated, so an in-place kernel must work on a copy.
    """
    decoding = (_mlstm if op == "mlstm" else _slstm)(*settings.step_sizes)
    tested = settings.mlstm if op == "mlstm" else settings.slstm
    flags = {} if fusion is None else {"xla_gpu_enable_dynamic_slice_fusion": fusion}
    before = jax.tree.map(np.array, decoding.states)
    results = []
    for name in (reference(op), tested):
        decode = functools.partial(through_layers, decoding, name, unroll=unroll)
        program = jax.jit(decode, compiler_options=flags)
        state, h = jax.tree.map(np.asarray, program(decoding.states, decoding.tokens))
        m = state.m.reshape(state.m.shape + (1,) * (state[0].ndim - state.m.ndim))
        results.append({"h": h, "state": state[0] * np.exp(m)})
    expected, actual = results
    errors = {name: relative_error(actual[name], expected[name]) for name in actual}
    after = jax.tree.leaves(decoding.states)
    errors["input_states"] = max(map(relative_error, after, jax.tree.leaves(before)))
    return {"errors": errors, "ok": all(error < 1e-4 for error in errors.values())}


def through_layers(decoding: Decoding, implementation: str, states, tokens, *, unroll: bool):
    """States after all tokens, and h of the last layer for each token."""

    def layer(h, state, token):
        return decoding.step(implementation, h, token, state)

    def scanned(states, token):
        h, states = jax.lax.scan(functools.partial(layer, token=token), decoding.zero, states)
        return states, h

    def unrolled(states, token):
        h, after = decoding.zero, []
        for number in range(states.m.shape[0]):
            h, state = layer(h, jax.tree.map(lambda leaf, n=number: leaf[n], states), token)
            after.append(state)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *after), h

    if not unroll:
        return jax.lax.scan(scanned, states, tokens)
    outputs = []
    for number in range(TOKENS):
        states, h = unrolled(states, jax.tree.map(lambda leaf, n=number: leaf[n], tokens))
        outputs.append(h)
    return states, jnp.stack(outputs)


def _random() -> Callable[..., jax.Array]:
    keys = iter(jax.random.split(jax.random.key(0), 12))
    return lambda *shape: jax.random.normal(next(keys), shape)


def _mlstm(layers: int, B: int, H: int, K: int, V: int) -> Decoding:
    normal = _random()
    states = cells.MLSTMState(
        normal(layers, B, H, K, V), normal(layers, B, H, K), normal(layers, B, H)
    )
    q, k, v = (normal(TOKENS, B, 1, H, size) for size in (K, K, V))
    tokens = (q, k, v, normal(TOKENS, B, 1, H), normal(TOKENS, B, 1, H) + 3)

    def step(implementation, h, token, state):
        q, k, v, i, f = token
        return ops.mlstm(q, k, v + h, i, f, state, implementation=implementation)

    return Decoding(states, tokens, jnp.zeros((B, 1, H, V)), step)


def _slstm(layers: int, B: int, H: int, K: int, V: int) -> Decoding:
    del V  # only the mLSTM has it
    normal = _random()
    c, n, h, m = normal(4, layers, B, H, K)
    states = cells.SLSTMState(c, 1 + abs(n), jnp.tanh(h), m)
    r = normal(H, K, 4, K) / math.sqrt(K)
    tokens = (normal(TOKENS, B, 1, 4, H, K),)

    def step(implementation, h, token, state):
        inputs = token[0] + h[:, :, None]
        return ops.slstm(inputs, r, None, state, implementation=implementation)

    return Decoding(states, tokens, jnp.zeros((B, 1, H, K)), step)
