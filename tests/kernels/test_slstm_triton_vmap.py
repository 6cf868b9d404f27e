"""`vmap` of the sLSTM Triton kernels, interpreted, against a loop."""

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
from tests.kernels.triton_interpreter import launches, recorded_launches
from tests.ops.subjects import implementations

REFUSAL = implementations("slstm")["triton"]

pytestmark = [
    pytest.mark.slow,  # interpreted; quick cases are in tests/ops and test_quick.py
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
    """Cases that differ in the fields `names`, the stacked case, and its `in_axes`."""
    options = {"B": 2, "T": 3, "K": 5, "flags": True} | options
    cases = [make_case(seed=seed, **options) for seed in range(size)]
    first = cases[0]._asdict()
    cases = [case._replace(**{n: a for n, a in first.items() if n not in names}) for case in cases]
    fields = {n: jax.tree.map(jnp.asarray, a) for n, a in first.items()}
    for name in names:
        values = (getattr(case, name) for case in cases)
        fields[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)
    axes = {n: 0 if n in names else None for n in first}
    return cases, Case(**fields), Case(**axes)


def assert_matches_loop(actual, expected):
    """Results with a leading mapped axis match the results of a loop."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
    jax.tree.map(close, actual, stacked)


def loop(function, cases):
    """The results of one call per case."""
    compute = quick.jit(function)
    return [compute(jax.tree.map(jnp.asarray, case)) for case in cases]


@every_mapping
def test_vmap_of_one_step_matches_a_loop(names):
    cases, stacked, axes = stack(names, T=1)
    with common.interpreted(lanes=LANES):
        actual = quick.jit(jax.vmap(run, in_axes=(axes,)))(stacked)
        assert_matches_loop(actual, loop(run, cases))


@every_mapping
def test_vmap_of_values_and_gradients_matches_a_loop(names):
    cases, stacked, axes = stack(names, T=2)
    with common.interpreted(lanes=LANES):
        actual = quick.jit(jax.vmap(value_and_gradients, in_axes=(axes,)))(stacked)
        assert_matches_loop(actual, loop(value_and_gradients, cases))


@pytest.mark.parametrize("names", [MAPPED["x"], MAPPED["everything"]], ids=["x", "everything"])
def test_gradient_of_a_vmap_matches_a_loop(names):
    cases, stacked, axes = stack(names)

    def loss(c):
        h, state = run(c)
        pairs = zip((h, *state), (c.dh, *c.dstate), strict=True)
        return sum(jnp.sum(result * cotangent) for result, cotangent in pairs)

    def grad_of(function):
        """Gradients for the differentiable fields, the first argument."""
        return jax.grad(lambda fields, c: function(c._replace(**fields)))

    with common.interpreted(lanes=LANES):
        pick = lambda c: {"x": c.x, "r": c.r, "b": c.b, "state": c.state}  # noqa: E731
        grad_of_vmap = grad_of(lambda c: jnp.sum(jax.vmap(loss, in_axes=(axes,))(c)))
        actual = quick.jit(grad_of_vmap)(pick(stacked), stacked)
        by_loop = loop(lambda c: grad_of(loss)(pick(c), c), cases)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *by_loop)
    for name, grads in actual.items():
        expected_grads = expected[name]
        if getattr(axes, name) is None:  # a shared field accumulates the gradients of all cases
            expected_grads = jax.tree.map(lambda a: a.sum(0), expected_grads)
        close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=5e-6)
        jax.tree.map(close, grads, expected_grads)


@both_flags
def test_vmap_over_models_matches_a_loop(flags):
    names = ("x", "r", "b", "state", "dh", "dstate")
    cases, stacked, axes = stack(names, size=5, T=2, flags=flags, B=1, H=1)
    with common.interpreted(lanes=LANES), recorded_launches() as launch_list:
        actual = quick.jit(jax.vmap(value_and_gradients, in_axes=(axes,)))(stacked)
        vmap_launches = list(launch_list)
        assert_matches_loop(actual, loop(value_and_gradients, cases))
    # Models are folded into the heads, even if they share flags.
    assert vmap_launches == [("slstm_forward", (5, 1)), ("slstm_backward", (5, 1))]


def test_sequences_of_a_vmap_share_programs():
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
def test_nested_vmap_matches_nested_loops(outer, inner):
    """Outer size 3, inner size 2; fields mapped by both have two leading axes."""
    cases = [
        [make_case(B=1, T=2, K=5, flags=True, seed=3 * i + j) for j in range(2)] for i in range(3)
    ]
    base = cases[0][0]

    def case_at(i, j) -> Case:
        pick = lambda n: cases[i if n in outer else 0][j if n in inner else 0]  # noqa: E731
        return Case(*(getattr(pick(name), name) for name in Case._fields))

    fields = {}
    for name in Case._fields:
        value = getattr(base, name)
        grid = [[getattr(case_at(i, j), name) for j in range(2)] for i in range(3)]
        if name in inner:
            value = [jax.tree.map(lambda *a: np.stack(a), *values) for values in grid]
            value = jax.tree.map(lambda *a: np.stack(a), *value) if name in outer else value[0]
        elif name in outer:
            value = jax.tree.map(lambda *a: np.stack(a), *(values[0] for values in grid))
        fields[name] = jax.tree.map(jnp.asarray, value)
    in_axes = [Case(*(0 if n in names else None for n in Case._fields)) for names in (inner, outer)]
    mapped = value_and_gradients
    for axes in in_axes:
        mapped = jax.vmap(mapped, in_axes=(axes,))
    with common.interpreted(lanes=LANES):
        actual = quick.jit(mapped)(Case(**fields))
        by_loop = loop(value_and_gradients, [case_at(i, j) for i in range(3) for j in range(2)])
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), actual)
    assert_matches_loop(flat, by_loop)


def test_results_without_jit_match_those_with_jit():
    case = jax.tree.map(jnp.asarray, make_case(T=3, flags=True))
    with common.interpreted(lanes=LANES):
        actual, expected = (function(case) for function in (run, quick.jit(lambda c: run(c))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), actual, expected)
