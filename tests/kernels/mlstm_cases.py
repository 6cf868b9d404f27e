"""Test cases of the mLSTM kernels, interpreted, and the float64 reference."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import common
from pallas_kernels.mlstm import api
from pallas_kernels.mlstm.options import Kernels
from tests import quick
from tests.ops.tolerances import TABLE, assert_close, assert_gradients_close
from xlstm_jax import cells

LANES = 8
LEAVES = ("C", "n", "m")
INPUTS = ("q", "k", "v", "i", "f")


STATES = {
    "given": lambda case: case,
    "zero": lambda case: case._replace(state=None),
    "final state unused": lambda case: case._replace(dstate=None),
    "zero, final state unused": lambda case: case._replace(state=None, dstate=None),
}
"""Which states a case has: the one before the first step, and the cotangent of the last."""


class Case(NamedTuple):
    """Arguments of a call, and cotangents of its results; None: the results have no such one."""

    q: Any
    k: Any
    v: Any
    i: Any
    f: Any
    state: tuple | None
    dh: Any
    dstate: tuple | None
    reset: Any = None
    mask: Any = None


def make_case(B=2, T=29, H=2, K=6, V=10, *, flags=False, scale=1.0, seed=0) -> Case:
    """Random arguments and random cotangents of h and of every leaf of the final state."""
    rng = np.random.default_rng([seed, B, T, H, K, V])
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    inputs = (normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V))
    gates = (scale * normal(B, T, H), scale * normal(B, T, H) + 3)
    state, dstate = (
        (normal(B, H, K, V), normal(B, H, K), normal(B, H)) for _ in ("state", "cotangents")
    )
    case = Case(*inputs, *gates, state, normal(B, T, H, V), dstate)
    if not flags:
        return case
    reset = rng.random((B, T)) < 4 / T
    return case._replace(reset=reset, mask=rng.random((B, T)) < 0.7)


def make_step_case(dtype="float32", K=6, V=10) -> Case:
    """One step of five sequences: plain, reset, masked with NaN inputs, tiny m, m = 60."""
    case = in_bfloat16(make_case(B=5, T=1, H=3, K=K, V=V))
    case = jax.tree.map(np.array, case)
    case = case._replace(reset=np.zeros((5, 1), bool), mask=np.ones((5, 1), bool))
    case.reset[1:3] = True
    case.mask[2] = False
    for name in INPUTS:
        getattr(case, name)[2] = np.nan
    case.state[2][3:] = [[-200.0, -25.0, -22.0], [60.0] * 3]
    case.i[3] = -250.0
    return case._replace(**{name: jnp.asarray(getattr(case, name), dtype) for name in INPUTS})


def in_bfloat16(case: Case, dtype="float32") -> Case:
    """The same case with inputs and dh rounded to bfloat16, as arrays of `dtype`."""
    names = (*INPUTS, "dh")
    rounded = {name: jnp.asarray(getattr(case, name), jnp.bfloat16).astype(dtype) for name in names}
    return case._replace(**rounded)


def with_resets(case: Case, pattern: str, chunk_size: int) -> Case:
    """The same case with resets at the steps of a pattern; no reset is masked but random ones."""
    steps = np.arange(case.q.shape[1])
    reset = {
        "random steps": case.reset,
        "chunk starts": steps % chunk_size == 0,
        "chunk ends": steps % chunk_size == chunk_size - 1,
        "every step": steps >= 0,
    }[pattern]
    if pattern == "random steps":  # includes masked resets, which have no effect
        return case
    reset = np.broadcast_to(reset, case.reset.shape)
    return case._replace(reset=reset, mask=case.mask | reset)


RESET_PATTERNS = ("random steps", "chunk starts", "chunk ends", "every step")


# Kernels


STRICT = {
    "nan": pltpu.InterpretParams(uninitialized_memory="nan"),
    "races": pltpu.InterpretParams(detect_races=True, random_seed=7),
}
"""Interpreters of Pallas that fill uninitialized memory with NaN, or detect races.

A race raises an error with jax 0.12; jax 0.10 prints "RACE DETECTED", which tests look for.
"""


def run(kernels: Kernels, case: Case, **options):
    """h and the final state of a case."""
    return api.mlstm(kernels, *case[:6], reset=case.reset, mask=case.mask, **options)


def interpret(
    kernels: Kernels, case: Case, *, interpreter=True, lanes=LANES, tile=None, **options
) -> dict[str, np.ndarray]:
    """h, the final state and all gradients by these kernels, interpreted.

    Chunks have 8 positions by default if lanes are 8; `tile` replaces the tile that the kernels
    would choose.
    """
    options.setdefault("chunk_size", LANES if lanes == LANES else None)
    function = _bound(kernels if tile is None else with_tile(kernels, tile))
    compiled = _compiled(function, tuple(sorted(options.items())), (interpreter, lanes))
    with common.interpreted(interpreter, lanes=lanes):
        return _as_float64(compiled(jax.tree.map(jnp.asarray, case)))


@functools.cache
def with_tile(kernels: Kernels, tile) -> Kernels:
    """The same kernels, using `tile` for every call."""
    return kernels._replace(tile=lambda *_: tile)


@functools.cache
def _bound(kernels: Kernels):
    return functools.partial(api.mlstm, kernels)


def evaluate(function, case: Case) -> dict[str, jax.Array]:
    """h, the final state and all gradients, by name."""
    compute = functools.partial(function, reset=case.reset, mask=case.mask)
    if case.dstate is None:  # the loss does not depend on the final state
        h, pullback, state = jax.vjp(compute, *case[:6], has_aux=True)
        *inputs, initial = pullback(case.dh)
    else:
        (h, state), pullback = jax.vjp(compute, *case[:6])
        *inputs, initial = pullback((case.dh, case.dstate))
    named = {"h": h, **dict(zip(LEAVES, state, strict=True))}
    named |= {f"d{name}": x for name, x in zip(INPUTS, inputs, strict=True)}
    if case.state is None:
        return named
    return named | {f"d{name}": x for name, x in zip(LEAVES, initial, strict=True)}


@functools.cache
def _compiled(function, options: tuple, context: tuple = ()):
    """The jitted program of a case; `context`, the settings in force while tracing, is a key."""
    del context
    return quick.jit(functools.partial(evaluate, functools.partial(function, **dict(options))))


def _as_float64(results):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), results)


# The reference


def reference(case: Case, **options) -> dict[str, np.ndarray]:
    """h, the final state and all gradients by the cell, in float64."""
    compiled = _compiled(_cell, tuple(sorted(options.items())))
    with jax.enable_x64(True):
        float64 = lambda a: jnp.asarray(a, bool if a.dtype == bool else "float64")  # noqa: E731
        return _as_float64(compiled(jax.tree.map(float64, case)))


def _cell(q, k, v, i, f, state, *, reset, mask, **options):
    (B, _, H, K), V = q.shape, v.shape[-1]
    state = cells.mlstm_init(B, H, K, V, q.dtype) if state is None else cells.MLSTMState(*state)
    h, state = cells.mlstm_scan(q, k, v, i, f, state, reset=reset, mask=mask, **options)
    return h, tuple(state)


# Comparisons


def assert_results_match(actual, expected, tolerance=TABLE["float32"]):
    """h, C, n and m of the final state, and all gradients agree."""
    assert_close(actual["h"], expected["h"], tolerance.h, "h")
    for name in LEAVES:
        assert_close(actual[name], expected[name], tolerance.state, name)
    gradients = [f"d{name}" for name in (*INPUTS, *LEAVES) if f"d{name}" in expected]
    pick = lambda results: {name[1:]: results[name] for name in gradients}  # noqa: E731
    assert_gradients_close(pick(actual), pick(expected), tolerance)


def assert_step_matches_cell(case: Case, actual, **options):
    """h, C, n and m agree; where masked, h is 0 and the state is bit-identical to the old."""
    dtype = str(case.q.dtype)
    as_float32 = {name: np.asarray(getattr(case, name), "float32") for name in INPUTS}
    expected = reference(case._replace(**as_float32), **options)
    h, state = actual
    assert h.dtype == case.v.dtype
    for b, (h_b, right) in enumerate(zip(np.asarray(h, "float64"), expected["h"], strict=True)):
        assert_close(h_b, right, TABLE[dtype].h, f"h of sequence {b}", floor=1e-30)
    for name, leaf in zip(LEAVES, state, strict=True):
        assert leaf.dtype == jnp.float32
        assert_close(np.asarray(leaf), expected[name], TABLE["float32"].state, name)
    if case.mask is not None:
        masked = ~case.mask[:, 0]
        assert not np.asarray(h, "float32")[masked].any()
        for old, new in zip(case.state, state, strict=True):
            np.testing.assert_array_equal(new[masked], old[masked])
