"""mLSTM kernels without a state before the first step, or without a cotangent of the last state.

TPU kernels start from zeros without an array of zeros; values and gradients are the same.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common
from pallas_kernels.mlstm import api, backends
from pallas_kernels.mlstm.tpu_tiles import Tile
from tests import quick
from tests.kernels import mlstm_cases
from tests.kernels.calls import calls
from tests.kernels.mlstm_cases import (
    INPUTS,
    LANES,
    STATES,
    STRICT,
    assert_results_match,
    make_case,
    reference,
)
from tests.kernels.mlstm_cases import interpret as kernel
from tests.ops.subjects import implementations
from tests.ops.tolerances import TABLE, assert_close, assert_gradients_close
from xlstm_jax import ops
from xlstm_jax.sharding import make_mesh

run = functools.partial(mlstm_cases.run, backends.tpu())
every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES)
TILE = Tile(8, 8, 2)
SIGMOID = {"input_gate": "sigmoid", "normalize": False}


@every_state
def test_results_match_the_recurrence_quickly(state):
    case = state(make_case(B=1, T=9, H=1, flags=True))
    assert_results_match(kernel(backends.tpu(), case), reference(case))


@pytest.mark.slow
@every_state
@pytest.mark.parametrize("options", [{}, SIGMOID, {"forget_gate": "exp"}], ids=str)
def test_results_match_the_recurrence(state, options):
    """An odd length, two blocks of two chunks, with resets and masked steps."""
    case = state(make_case(T=29, flags=True))
    if "forget_gate" in options:  # otherwise the state grows by e^3 at every step
        case = case._replace(f=case.f - 4)
    actual = kernel(backends.tpu(), case, tile=TILE, **options)
    assert_results_match(actual, reference(case, **options))


@pytest.mark.slow
@every_state
@pytest.mark.parametrize("interpreter", STRICT.values(), ids=STRICT)
def test_kernels_have_no_uninitialized_reads_or_races(state, interpreter, capfd):
    case = state(make_case(B=1, T=29))
    actual = kernel(backends.tpu(), case, interpreter=interpreter, tile=TILE)
    assert_results_match(actual, reference(case))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
@every_state
def test_triton_kernels_match_the_recurrence(state):
    if (refusal := implementations("mlstm")["triton"]) is not None:
        pytest.skip(str(refusal))
    case = state(make_case(B=1, T=21, H=1, flags=True))
    assert_results_match(kernel(backends.triton(), case), reference(case))


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 13], ids="T{}".format)
@pytest.mark.parametrize("name", ["jit", "checkpoint", "vmap"])
def test_transformations_keep_gradients_without_states(name, T):
    """The gradient of h alone for two cases; T = 1 is a step, whose kernel needs a state."""
    cases = [jax.tree.map(jnp.asarray, make_case(T=T, seed=seed)) for seed in (0, 1)]
    inputs = jax.tree.map(lambda *x: jnp.stack(x), *(case[:5] for case in cases))
    zeros = jax.tree.map(jnp.zeros_like, cases[0].state)

    def loss(inputs, state):
        call = lambda x: api.mlstm(backends.tpu(), *x, state)[0]  # noqa: E731
        if state is None and name == "vmap":
            return jnp.sum(jnp.sin(jax.vmap(call)(inputs)))
        call = getattr(jax, name)(call) if state is None else call
        pick = lambda index: jax.tree.map(lambda x: x[index], inputs)  # noqa: E731
        return sum(jnp.sum(jnp.sin(call(pick(index)))) for index in (0, 1))

    with common.interpreted(lanes=LANES):
        gradient = quick.jit(jax.grad(loss))
        actual, expected = gradient(inputs, None), gradient(inputs, zeros)
    for a, b in zip(actual, expected, strict=True):
        assert_close(np.asarray(a), np.asarray(b), TABLE["float32"].h, "gradient", floor=1e-7)


@pytest.mark.parametrize("state,operands", [("given", (6, 8)), ("zero", (4, 8))], ids=str)
def test_kernels_read_neither_a_zero_state_nor_a_zero_cotangent(state, operands):
    """And without a state, the backward kernel does not return its gradient."""
    case = jax.tree.map(jnp.asarray, STATES[state](make_case()))

    def loss(inputs, state):
        return run(case._replace(**dict(zip(INPUTS, inputs, strict=True)), state=state))[0].sum()

    forward, backward = calls(jax.grad(loss, argnums=(0, 1)), case[:5], case.state)
    assert (len(forward.invars), len(backward.invars)) == operands
    assert len(backward.outvars) == (4 if case.state is None else 6)


def test_final_state_is_read_by_the_backward_pass_only_if_the_loss_depends_on_it():
    case = jax.tree.map(jnp.asarray, make_case())

    def loss(inputs, *, weight):
        h, state = run(case._replace(**dict(zip(INPUTS, inputs, strict=True))))
        return h.sum() + (state[0].sum() if weight else 0)

    for weight, operands in ((False, 8), (True, 10)):
        _, backward = calls(jax.grad(functools.partial(loss, weight=weight)), case[:5])
        assert len(backward.invars) == operands


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one device", "mesh"]
)
def test_op_without_a_state_matches_the_recurrence_and_passes_none_to_the_kernels(sizes):
    """On a mesh, the kernels run under `jax.shard_map`."""
    case = jax.tree.map(jnp.asarray, make_case(B=4))
    inputs = dict(zip(INPUTS, case[:5], strict=True))

    def loss(inputs, *, implementation):
        return jnp.sum(case.dh * ops.mlstm(**inputs, implementation=implementation)[0])

    def gradient(implementation):
        return jax.grad(functools.partial(loss, implementation=implementation))

    expected = quick.jit(gradient("recurrent"))(inputs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(common.interpreted(lanes=LANES))
        if sizes:
            stack.enter_context(jax.set_mesh(make_mesh(**sizes)))
        assert [len(x.invars) for x in calls(gradient("pallas_tpu"), inputs)] == [4, 8]
        actual = quick.jit(gradient("pallas_tpu"))(inputs)
    as_numpy = functools.partial(jax.tree.map, np.asarray)
    assert_gradients_close(as_numpy(actual), as_numpy(expected), TABLE["float32"])
