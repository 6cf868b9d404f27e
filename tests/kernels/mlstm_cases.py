"""Calls of the mLSTM's kernels, the reference, and how kernels are interpreted here."""

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


class Case(NamedTuple):
    q: Any
    k: Any
    v: Any
    i: Any
    f: Any
    state: tuple
    dh: Any
    dstate: tuple
    reset: Any = None
    mask: Any = None


def make_case(B=2, T=29, H=2, K=6, V=10, *, flags=False, scale=1.0, seed=0) -> Case:
    """Random arguments and a random loss on h and on every leaf of the last state, as stored."""
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


def make_step(dtype="float32", K=6, V=10) -> Case:
    """Rows: plain, reset, masked with NaN in it, memories of tiny scale, one of scale e^60."""
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
    """Inputs and the loss on h rounded to bfloat16, as arrays of `dtype`."""
    names = (*INPUTS, "dh")
    half = {name: jnp.asarray(getattr(case, name), jnp.bfloat16).astype(dtype) for name in names}
    return case._replace(**half)


def with_resets(case: Case, where: str, chunk_size: int) -> Case:
    """The same call with its resets `where` a key below says; none of them is masked."""
    steps = np.arange(case.q.shape[1])
    pattern = {
        "random steps": case.reset,
        "chunk starts": steps % chunk_size == 0,
        "chunk ends": steps % chunk_size == chunk_size - 1,
        "every step": steps >= 0,
    }[where]
    if where == "random steps":  # masked resets, which are void, among them
        return case
    reset = np.broadcast_to(pattern, case.reset.shape)
    return case._replace(reset=reset, mask=case.mask | reset)


RESETS = ("random steps", "chunk starts", "chunk ends", "every step")


# By the kernels


STRICT = {
    "nan": pltpu.InterpretParams(uninitialized_memory="nan"),
    "races": pltpu.InterpretParams(detect_races=True, random_seed=7),
}
"""How the interpreter of Pallas may be told to find memory nobody wrote, and races."""


def run(kernels: Kernels, case: Case, **options):
    """h and the last state of a case."""
    return api.mlstm(kernels, *case[:6], reset=case.reset, mask=case.mask, **options)


def interpret(
    kernels: Kernels, case: Case, *, how=True, lanes=LANES, tile=None, **options
) -> dict[str, np.ndarray]:
    """Everything by these kernels, interpreted; chunks of 8 where lanes are 8.

    `tile` stands in place of the one that a test's sizes would get.
    """
    options.setdefault("chunk_size", LANES if lanes == LANES else None)
    function = _by(kernels if tile is None else cut(kernels, tile))
    compiled = _compiled(function, tuple(sorted(options.items())), (how, lanes))
    with common.interpreted(how, lanes=lanes):
        return _wide(compiled(jax.tree.map(jnp.asarray, case)))


@functools.cache
def cut(kernels: Kernels, tile) -> Kernels:
    """The same kernels, all of whose calls are cut in one way."""
    return kernels._replace(tile=lambda *_: tile)


@functools.cache
def _by(kernels: Kernels):
    return functools.partial(api.mlstm, kernels)


def evaluate(function, case: Case) -> dict[str, jax.Array]:
    """h, the last state and all gradients, by name."""
    compute = functools.partial(function, reset=case.reset, mask=case.mask)
    (h, state), pull = jax.vjp(compute, *case[:6])
    *inputs, first = pull((case.dh, case.dstate))
    named = {"h": h, **dict(zip(LEAVES, state, strict=True))}
    named |= {f"d{name}": x for name, x in zip(INPUTS, inputs, strict=True)}
    return named | {f"d{name}": x for name, x in zip(LEAVES, first, strict=True)}


@functools.cache
def _compiled(function, options: tuple, where: tuple = ()):
    """A program of a case; `where` says what it is traced in, as that is part of it, too."""
    del where
    return quick.jit(functools.partial(evaluate, functools.partial(function, **dict(options))))


def _wide(results):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), results)


# The reference


def truth(case: Case, **options) -> dict[str, np.ndarray]:
    """By the cell, in float64."""
    compiled = _compiled(_by_the_cell, tuple(sorted(options.items())))
    with jax.enable_x64(True):
        wide = lambda a: jnp.asarray(a, bool if a.dtype == bool else "float64")  # noqa: E731
        return _wide(compiled(jax.tree.map(wide, case)))


def _by_the_cell(q, k, v, i, f, state, *, reset, mask, **options):
    state = cells.MLSTMState(*state)
    h, state = cells.mlstm_scan(q, k, v, i, f, state, reset=reset, mask=mask, **options)
    return h, tuple(state)


# Comparisons


def assert_equal_results(actual, expected, row=TABLE["float32"]):
    """h, the state with the same log-scale, and all gradients agree."""
    assert_close(actual["h"], expected["h"], row.h, "h")
    for name in LEAVES:
        assert_close(actual[name], expected[name], row.state, name)
    gradients = [f"d{name}" for name in (*INPUTS, *LEAVES)]
    pick = lambda results: {name[1:]: results[name] for name in gradients}  # noqa: E731
    assert_gradients_close(pick(actual), pick(expected), row)


def assert_step_equals_the_cell(case: Case, actual, **options):
    """h, C, n and m of one step; what is masked stays bit for bit."""
    dtype = str(case.q.dtype)
    wide = case._replace(**{name: np.asarray(getattr(case, name), "float32") for name in INPUTS})
    expected = truth(wide, **options)
    h, state = actual
    assert h.dtype == case.v.dtype
    for row, (found, right) in enumerate(zip(np.asarray(h, "float64"), expected["h"], strict=True)):
        assert_close(found, right, TABLE[dtype].h, f"h of row {row}", floor=1e-30)
    for name, leaf in zip(LEAVES, state, strict=True):
        assert leaf.dtype == jnp.float32
        assert_close(np.asarray(leaf), expected[name], TABLE["float32"].state, name)
    if case.mask is not None:
        asleep = ~case.mask[:, 0]
        assert not np.asarray(h, "float32")[asleep].any()
        for old, new in zip(case.state, state, strict=True):
            np.testing.assert_array_equal(new[asleep], old[asleep])
