"""Calls of the sLSTM's kernels, the reference, and how kernels are interpreted here."""

import contextlib
import functools
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import common
from pallas_kernels.slstm import api
from pallas_kernels.slstm.options import Kernels
from tests import quick
from tests.ops.tolerances import TABLE, assert_close, assert_gradients_close
from xlstm_jax import cells

LANES = 8
LEAVES = ("c", "n", "h", "m")


class Case(NamedTuple):
    x: Any
    r: Any
    b: Any
    state: tuple
    dh: Any
    dstate: tuple
    reset: Any = None
    mask: Any = None


def make_case(B=2, T=13, H=2, K=8, *, flags=False, scale=1.0, seed=0) -> Case:
    """Random arguments and a random loss on h and on every leaf of the last state, as stored."""
    rng = np.random.default_rng([seed, B, T, H, K])
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    state = (0.5 * normal(B, H, K), 1 + abs(normal(B, H, K)), 0.3 * normal(B, H, K))
    dstate = tuple(normal(B, H, K) for _ in LEAVES)
    r = 0.5 * K**-0.5 * normal(H, K, 4, K)
    b = 0.5 * normal(H, 4, K)
    x, dh = scale * normal(B, T, 4, H, K), normal(B, T, H, K)
    case = Case(x, r, b, (*state, normal(B, H, K)), dh, dstate)
    if not flags:
        return case
    return case._replace(reset=rng.random((B, T)) < 0.2, mask=rng.random((B, T)) < 0.7)


def in_bfloat16(case: Case, dtype="float32", r_dtype=None) -> Case:
    """The same case, rounded to bfloat16, in another dtype."""
    half = lambda a, to: np.asarray(jnp.asarray(jnp.asarray(a, jnp.bfloat16), to))  # noqa: E731
    x, dh = half(case.x, dtype), half(case.dh, dtype)
    return case._replace(x=x, dh=dh, r=half(case.r, r_dtype or dtype))


def with_flags(case: Case, reset, mask) -> Case:
    """Flags of a few steps, the same in every sequence but shifted by one."""
    B = case.x.shape[0]
    shifted = lambda flag: np.stack([np.roll(flag, b) for b in range(B)]).astype(bool)  # noqa: E731
    given = {"reset": reset, "mask": mask}
    return case._replace(**{n: shifted(flag) for n, flag in given.items() if flag is not None})


# By the kernels


def run(kernels: Kernels, case: Case, **options):
    """h and the last state of a case."""
    return api.slstm(kernels, *case[:4], case.reset, case.mask, **options)


def value_and_gradients(kernels: Kernels, case: Case):
    """h, the last state, and the gradients of the case's loss."""
    compute = functools.partial(api.slstm, kernels, reset=case.reset, mask=case.mask)
    outputs, pull = jax.vjp(compute, *case[:4])
    return outputs, pull((case.dh, case.dstate))


def step(kernels: Kernels, case: Case, **options):
    """h and the state after a case of one step, interpreted."""
    compiled = quick.jit(functools.partial(run, kernels, **options))
    with common.interpreted(lanes=LANES):
        return compiled(jax.tree.map(jnp.asarray, case))


@functools.cache
def cut(kernels: Kernels, tile) -> Kernels:
    """The same kernels, all of whose calls have one tile."""
    return kernels._replace(tile=lambda *_: tile)


@contextlib.contextmanager
def saving_gates(saved: bool | None):
    """Gradients traced inside save the gates or recompute them; None: as their size says."""
    most = api.SAVED_GATES_BYTES if saved is None else (1 << 40) * saved
    with mock.patch.object(api, "SAVED_GATES_BYTES", most):
        yield


def interpret(
    kernels: Kernels, case: Case, *, how=True, lanes=LANES, save_gates=None, **options
) -> dict[str, np.ndarray]:
    """Everything by these kernels, interpreted."""
    function = _by(kernels, tuple(sorted(options.items())))
    compiled = _compiled(function, (how, lanes, save_gates))
    with saving_gates(save_gates), common.interpreted(how, lanes=lanes):
        return _named(compiled(jax.tree.map(jnp.asarray, case)))


@functools.cache
def _by(kernels: Kernels, options: tuple):
    return functools.partial(api.slstm, kernels, **dict(options))


@functools.cache
def _compiled(function, where: tuple = ()):
    """A program of a case; `where` says what it is traced in, as that is part of it, too."""
    del where

    def evaluate(case):
        compute = functools.partial(function, reset=case.reset, mask=case.mask)
        (h, state), pull = jax.vjp(compute, *case[:4])
        return h, state, pull((case.dh, case.dstate))

    return quick.jit(evaluate)


def _named(results) -> dict[str, np.ndarray]:
    """h, the last state and all gradients, by name."""
    h, state, (dx, dr, db, dstate) = jax.tree.map(lambda a: np.asarray(a, np.float64), results)
    named = {"h": h, "dx": dx, "dr": dr, "db": db}
    named |= {name: leaf for name, leaf in zip(LEAVES, state, strict=True) if name != "h"}
    return named | {f"d{name}": leaf for name, leaf in zip(LEAVES, dstate, strict=True)}


# The reference


def truth(case: Case, **options) -> dict[str, np.ndarray]:
    """By the cell, in float64."""
    with jax.enable_x64(True):
        wide = lambda a: jnp.asarray(a, bool if a.dtype == bool else "float64")  # noqa: E731
        return _named(_compiled(_cell(**options))(jax.tree.map(wide, case)))


@functools.cache
def _cell(**options):
    def function(x, r, b, state, reset, mask):
        state = cells.SLSTMState(*state)
        h, state = cells.slstm_scan(x, r, b, state, reset=reset, mask=mask, **options)
        return h, tuple(state)

    return function


def assert_equal_results(actual, expected, row=TABLE["float32"]):
    """h, the state and its stabilizer as stored, and all gradients agree."""
    gradients = [name for name in expected if name.startswith("d")]
    for name in expected.keys() - gradients:
        assert_close(actual[name], expected[name], row.h, name)
    pick = lambda results: {name[1:]: results[name] for name in gradients}  # noqa: E731
    assert_gradients_close(pick(actual), pick(expected), row)


def assert_step_equals_the_cell(case: Case, found, row=TABLE["float32"], **options):
    """h and every leaf of the state; where masked, bit for bit the old state."""
    h, state = found
    clean = case._replace(x=np.nan_to_num(np.asarray(case.x, np.float32)))
    expected = truth(clean, **options)
    assert_close(np.asarray(h, np.float64), expected["h"], row.h, "h")
    for name, leaf in zip(LEAVES, state, strict=True):
        if name != "h":
            assert_close(np.asarray(leaf), expected[name], row.state, name)
    awake = slice(None) if case.mask is None else case.mask[:, 0]
    assert_close(np.asarray(state[2])[awake], expected["h"][awake, 0], row.h, "h")
    if case.mask is not None:
        for old, leaf in zip(case.state, state, strict=True):
            np.testing.assert_array_equal(leaf[~case.mask[:, 0]], old[~case.mask[:, 0]])
