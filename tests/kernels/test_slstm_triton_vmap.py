"""`vmap` of the sLSTM's Triton kernels, interpreted, against a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common
from pallas_kernels.slstm import backends
from tests import quick
from tests.kernels import slstm_cases
from tests.kernels.slstm_cases import LANES, Case, make_case
from tests.kernels.watch import launches, recorded
from tests.ops.subjects import implementations

REFUSAL = implementations("slstm")["triton"]

pytestmark = [
    pytest.mark.slow,  # cases by an interpreter; quick ones are in tests/ops and test_quick.py
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]

both_flags = pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
run = functools.partial(slstm_cases.run, backends.triton())
value_and_gradients = functools.partial(slstm_cases.value_and_gradients, backends.triton())


MAPPED = {
    "x": ("x", "dh"),
    "the state": ("state",),
    "flags": ("reset", "mask"),
    "all but weights": ("x", "state", "dh", "dstate", "reset", "mask"),
    "weights": ("r",),
    "the bias": ("b",),
    "weights and flags": ("r", "reset", "mask"),
    "everything": Case._fields,
}
every_mapping = pytest.mark.parametrize("names", MAPPED.values(), ids=MAPPED)


def stack(names, size=2, **options):
    """Cases that differ in these fields, one case with another axis in front, and where it is."""
    options = {"B": 2, "T": 3, "K": 5, "flags": True} | options
    cases = [make_case(seed=seed, **options) for seed in range(size)]
    first = cases[0]._asdict()
    cases = [case._replace(**{n: a for n, a in first.items() if n not in names}) for case in cases]
    given = {n: jax.tree.map(jnp.asarray, a) for n, a in first.items()}
    for name in names:
        each = (getattr(case, name) for case in cases)
        given[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    axes = {n: 0 if n in names else None for n in first}
    return cases, Case(**given), Case(**axes)


def assert_each_equals(actual, expected):
    """Results that have another axis in front are those of a loop."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
    jax.tree.map(close, actual, stacked)


def loop(function, cases):
    compute = quick.jit(function)
    return [compute(jax.tree.map(jnp.asarray, case)) for case in cases]


@every_mapping
def test_vmap_of_one_step_equals_a_loop(names):
    cases, stacked, axes = stack(names, T=1)
    with common.interpreted(lanes=LANES):
        actual = quick.jit(jax.vmap(run, in_axes=(axes,)))(stacked)
        assert_each_equals(actual, loop(run, cases))


@every_mapping
def test_vmap_of_values_and_gradients_equals_a_loop(names):
    cases, stacked, axes = stack(names, T=2)
    with common.interpreted(lanes=LANES):
        actual = quick.jit(jax.vmap(value_and_gradients, in_axes=(axes,)))(stacked)
        assert_each_equals(actual, loop(value_and_gradients, cases))


@pytest.mark.parametrize("names", [MAPPED["x"], MAPPED["everything"]], ids=["x", "everything"])
def test_the_gradient_of_a_vmap_equals_a_loop(names):
    cases, stacked, axes = stack(names)

    def loss(c):
        h, state = run(c)
        pairs = zip((h, *state), (c.dh, *c.dstate), strict=True)
        return sum(jnp.sum(found * weight) for found, weight in pairs)

    def of_floats(function):
        return jax.grad(lambda floats, c: function(c._replace(**floats)))

    with common.interpreted(lanes=LANES):
        pick = lambda c: {"x": c.x, "r": c.r, "b": c.b, "state": c.state}  # noqa: E731
        together = of_floats(lambda c: jnp.sum(jax.vmap(loss, in_axes=(axes,))(c)))
        actual = quick.jit(together)(pick(stacked), stacked)
        alone = loop(lambda c: of_floats(loss)(pick(c), c), cases)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    for name, found in actual.items():
        of_name = expected[name]
        if getattr(axes, name) is None:
            of_name = jax.tree.map(lambda a: a.sum(0), of_name)
        close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=5e-6)
        jax.tree.map(close, found, of_name)


@both_flags
def test_several_models_at_once_equal_a_loop(flags):
    names = ("x", "r", "b", "state", "dh", "dstate")
    cases, stacked, axes = stack(names, size=5, T=2, flags=flags, B=1, H=1)
    with common.interpreted(lanes=LANES), recorded() as found:
        actual = quick.jit(jax.vmap(value_and_gradients, in_axes=(axes,)))(stacked)
        grids = list(found)
        assert_each_equals(actual, loop(value_and_gradients, cases))
    # Models become heads: flags that they share do not keep them apart.
    assert grids == [("slstm_forward", (5, 1)), ("slstm_backward", (5, 1))]


def test_rows_of_a_vmap_share_programs():
    _, stacked, axes = stack(MAPPED["all but weights"], size=8)
    mapped = jax.vmap(run, in_axes=(axes,))
    assert launches(mapped, stacked) == [("slstm_forward", (2, 1))]


@pytest.mark.parametrize(
    "outer,inner",
    [
        (("x",), ("r", "x")),
        (("r", "b"), ("state", "mask")),
        (("reset", "mask"), ("x",)),
        (("reset", "mask"), ("r", "x")),
    ],
    ids=str,
)
def test_a_vmap_in_a_vmap_equals_two_loops(outer, inner):
    """Outer 3, inner 2; what is mapped by both has two axes in front."""
    cases = [
        [make_case(B=1, T=2, K=5, flags=True, seed=3 * i + j) for j in range(2)] for i in range(3)
    ]
    base = cases[0][0]

    def at(i, j) -> Case:
        pick = lambda n: cases[i if n in outer else 0][j if n in inner else 0]  # noqa: E731
        return Case(*(getattr(pick(name), name) for name in Case._fields))

    given = {}
    for name in Case._fields:
        value = getattr(base, name)
        numbers = [[getattr(at(i, j), name) for j in range(2)] for i in range(3)]
        if name in inner:
            value = [jax.tree.map(lambda *a: np.stack(a), *row) for row in numbers]
            value = jax.tree.map(lambda *a: np.stack(a), *value) if name in outer else value[0]
        elif name in outer:
            value = jax.tree.map(lambda *a: np.stack(a), *(row[0] for row in numbers))
        given[name] = jax.tree.map(jnp.asarray, value)
    axes = [Case(*(0 if n in names else None for n in Case._fields)) for names in (inner, outer)]
    mapped = value_and_gradients
    for of in axes:
        mapped = jax.vmap(mapped, in_axes=(of,))
    with common.interpreted(lanes=LANES):
        actual = quick.jit(mapped)(Case(**given))
        alone = loop(value_and_gradients, [at(i, j) for i in range(3) for j in range(2)])
    split = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), actual)
    assert_each_equals(split, alone)


def test_without_jit_all_is_the_same():
    case = jax.tree.map(jnp.asarray, make_case(T=3, flags=True))
    with common.interpreted(lanes=LANES):
        found, expected = (function(case) for function in (run, quick.jit(lambda c: run(c))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)
