"""Test cases of the sLSTM kernels, interpreted, and the float64 reference."""

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
    """Arguments of a call, and cotangents of its results."""

    x: Any
    r: Any
    b: Any
    state: tuple
    dh: Any
    dstate: tuple
    reset: Any = None
    mask: Any = None


def make_case(B=2, T=13, H=2, K=8, *, flags=False, scale=1.0, seed=0) -> Case:
    """Random arguments and random cotangents of h and of every leaf of the final state."""
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
    """The same case with values rounded to bfloat16, as arrays of `dtype`."""
    rounded = lambda a, to: np.asarray(jnp.asarray(jnp.asarray(a, jnp.bfloat16), to))  # noqa: E731
    x, dh = rounded(case.x, dtype), rounded(case.dh, dtype)
    return case._replace(x=x, dh=dh, r=rounded(case.r, r_dtype or dtype))


def with_flags(case: Case, reset, mask) -> Case:
    """The case with the flags of one sequence, shifted by one step from sequence to sequence."""
    B = case.x.shape[0]
    shifted = lambda flag: np.stack([np.roll(flag, b) for b in range(B)]).astype(bool)  # noqa: E731
    flags = {"reset": reset, "mask": mask}
    return case._replace(**{n: shifted(flag) for n, flag in flags.items() if flag is not None})


# Kernels


def run(kernels: Kernels, case: Case, **options):
    """h and the final state of a case."""
    return api.slstm(kernels, *case[:4], case.reset, case.mask, **options)


def value_and_gradients(kernels: Kernels, case: Case):
    """(h, final state), and the gradients for the cotangents of the case."""
    compute = functools.partial(api.slstm, kernels, reset=case.reset, mask=case.mask)
    outputs, pullback = jax.vjp(compute, *case[:4])
    return outputs, pullback((case.dh, case.dstate))


def step(kernels: Kernels, case: Case, **options):
    """h and the state of a case of one step, interpreted."""
    compiled = quick.jit(functools.partial(run, kernels, **options))
    with common.interpreted(lanes=LANES):
        return compiled(jax.tree.map(jnp.asarray, case))


@functools.cache
def with_tile(kernels: Kernels, tile) -> Kernels:
    """The same kernels, using `tile` for every call."""
    return kernels._replace(tile=lambda *_: tile)


@contextlib.contextmanager
def saving_gates(saved: bool | None):
    """Gradients traced inside save or recompute the gates; None: the default rule by size."""
    limit = api.SAVED_GATES_BYTES if saved is None else (1 << 40) * saved
    with mock.patch.object(api, "SAVED_GATES_BYTES", limit):
        yield


def interpret(
    kernels: Kernels, case: Case, *, interpreter=True, lanes=LANES, save_gates=None, **options
) -> dict[str, np.ndarray]:
    """h, the final state and all gradients by these kernels, interpreted."""
    function = _bound(kernels, tuple(sorted(options.items())))
    compiled = _compiled(function, (interpreter, lanes, save_gates))
    with saving_gates(save_gates), common.interpreted(interpreter, lanes=lanes):
        return _named(compiled(jax.tree.map(jnp.asarray, case)))


@functools.cache
def _bound(kernels: Kernels, options: tuple):
    return functools.partial(api.slstm, kernels, **dict(options))


@functools.cache
def _compiled(function, context: tuple = ()):
    """The jitted program of a case; `context`, the settings in force while tracing, is a key."""
    del context

    def evaluate(case):
        compute = functools.partial(function, reset=case.reset, mask=case.mask)
        (h, state), pullback = jax.vjp(compute, *case[:4])
        return h, state, pullback((case.dh, case.dstate))

    return quick.jit(evaluate)


def _named(results) -> dict[str, np.ndarray]:
    """h, the final state and all gradients, by name."""
    h, state, (dx, dr, db, dstate) = jax.tree.map(lambda a: np.asarray(a, np.float64), results)
    named = {"h": h, "dx": dx, "dr": dr, "db": db}
    named |= {name: leaf for name, leaf in zip(LEAVES, state, strict=True) if name != "h"}
    return named | {f"d{name}": leaf for name, leaf in zip(LEAVES, dstate, strict=True)}


# The reference


def reference(case: Case, **options) -> dict[str, np.ndarray]:
    """h, the final state and all gradients by the cell, in float64."""
    with jax.enable_x64(True):
        float64 = lambda a: jnp.asarray(a, bool if a.dtype == bool else "float64")  # noqa: E731
        return _named(_compiled(_cell(**options))(jax.tree.map(float64, case)))


@functools.cache
def _cell(**options):
    def function(x, r, b, state, reset, mask):
        state = cells.SLSTMState(*state)
        h, state = cells.slstm_scan(x, r, b, state, reset=reset, mask=mask, **options)
        return h, tuple(state)

    return function


def assert_results_match(actual, expected, tolerance=TABLE["float32"]):
    """h, c, n and m of the final state, and all gradients agree."""
    gradients = [name for name in expected if name.startswith("d")]
    for name in expected.keys() - gradients:
        assert_close(actual[name], expected[name], tolerance.h, name)
    pick = lambda results: {name[1:]: results[name] for name in gradients}  # noqa: E731
    assert_gradients_close(pick(actual), pick(expected), tolerance)


def assert_step_matches_cell(case: Case, actual, tolerance=TABLE["float32"], **options):
    """h and every leaf of the state agree; where masked, the state is bit-identical to the old."""
    h, state = actual
    clean = case._replace(x=np.nan_to_num(np.asarray(case.x, np.float32)))
    expected = reference(clean, **options)
    assert_close(np.asarray(h, np.float64), expected["h"], tolerance.h, "h")
    for name, leaf in zip(LEAVES, state, strict=True):
        if name != "h":
            assert_close(np.asarray(leaf), expected[name], tolerance.state, name)
    active = slice(None) if case.mask is None else case.mask[:, 0]
    assert_close(np.asarray(state[2])[active], expected["h"][active, 0], tolerance.h, "h")
    if case.mask is not None:
        for old, leaf in zip(case.state, state, strict=True):
            np.testing.assert_array_equal(leaf[~case.mask[:, 0]], old[~case.mask[:, 0]])
