"""Signature of the recurrent ops: dtypes, transformations, implementations, and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from tests import quick
from tests.ops import runs, tolerances
from tests.ops.subjects import (
    OPTIONS,
    PRIMARY,
    B,
    H,
    K,
    L,
    Subject,
    V,
    from_initial_state,
    make_case,
    subjects,
    with_flags,
)
from tests.ops.tolerances import TABLE
from xlstm_jax import ops
from xlstm_jax.ops import dispatch


@pytest.fixture
def unchecked():
    """Without jaxtyping's checks, as for a user: the ops then raise for bad shapes themselves."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def arguments(op: str, T: int = 5, dtype="float32") -> dict[str, jax.Array]:
    """Arrays of one call by argument name, without a state."""
    case = make_case(op, T)
    return {name: jnp.asarray(x, dtype) for name, x in {**case.inputs, **case.weights}.items()}


@subjects(quick=PRIMARY)
def test_bfloat16_inputs_give_float32_states_and_bfloat16_h(subject):
    case = make_case(subject.variant, 29)
    call = runs.program(subject)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), (case.inputs, case.weights)
    )
    h, state = jax.eval_shape(call, *shapes, None)
    assert h.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in state} == {jnp.dtype("float32")}


@subjects(quick=PRIMARY)
def test_bfloat16_inputs_equal_the_recurrence_of_the_rounded_inputs(subject):
    case = jax.tree.map(_as_bfloat16, make_case(subject.variant, 29))
    cotangents = runs.random_cotangents(subject.variant, case)
    cotangents = cotangents._replace(h=_as_bfloat16(cotangents.h))
    actual = runs.run(subject, case, cotangents, "bfloat16")
    expected = runs.run_reference(subject.variant, case, cotangents)
    runs.assert_results_close(actual, expected, TABLE["bfloat16"])


def _as_bfloat16(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


@subjects(quick=PRIMARY)
def test_state_none_equals_the_initial_state(subject):
    case = from_initial_state(make_case(subject.variant, 9))
    call = quick.jit(runs.program(subject))
    args = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case)
    expected = call(args.inputs, args.weights, args.state)
    actual = call(args.inputs, args.weights, None)
    # Without a cache, fewer terms of a softmax, which are 0, are summed.
    rtol = 1e-5 if subject.op == "attention" else 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, rtol), actual, expected)


@subjects("slstm", "lstm")
def test_bias_none_equals_a_zero_bias(subject):
    case = make_case(subject.variant, 9)
    case = case._replace(weights={**case.weights, "b": np.zeros_like(case.weights["b"])})
    without = case._replace(weights={"r": case.weights["r"]})
    cotangents = runs.random_cotangents(subject.variant, case)
    expected = runs.run(subject, case, cotangents)
    actual = runs.run(subject, without, cotangents)
    gradients = {name: g for name, g in expected.gradients.items() if name != "b"}
    runs.assert_results_close(actual, expected._replace(gradients=gradients), TABLE["float32"])


@pytest.mark.slow
@subjects(quick=PRIMARY)
def test_vmap_over_a_leading_axis_equals_a_loop(subject):
    """Values and gradients, mapped over inputs, flags and states; weights are shared."""
    cases = [
        with_flags(make_case(subject.variant, 9, seed=s), num_masked=2, seed=s) for s in (0, 1)
    ]
    weights = jax.tree.map(jnp.float32, cases[0].weights)
    cases = [case._replace(weights=cases[0].weights) for case in cases]
    call = runs.program(subject)

    def loss(weights, inputs, state, reset, mask):
        h, last = call(inputs, weights, state, reset, mask)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in (h, *last))

    leaves = lambda c: jax.tree.map(  # noqa: E731
        lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.float32),
        (c.inputs, c.state, c.reset, c.mask),
    )
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(leaves(case) for case in cases))
    step = jax.value_and_grad(loss, argnums=(0, 1, 2))
    axes = (None, 0, 0, 0, 0)
    mapped = quick.jit(jax.vmap(step, axes))(weights, *stacked)
    step = quick.jit(step)
    for index, case in enumerate(cases):
        expected = jax.tree.leaves(step(weights, *leaves(case)))
        actual = [leaf[index] for leaf in jax.tree.leaves(mapped)]
        for a, b in zip(actual, expected, strict=True):
            tolerances.assert_close(*map(np.asarray, (a, b)), 5e-5, "vmap", floor=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("op", PRIMARY)
def test_eager_call_equals_the_jitted_call(op):
    args = arguments(op)
    eager = runs.OPS[op](**args)
    compiled = jax.jit(runs.OPS[op])(**args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), eager, compiled
    )


@pytest.mark.parametrize("op", PRIMARY)
def test_implementations_lists_none_or_a_reason(op):
    table = ops.implementations(op)
    assert {"mlstm": {"recurrent", "parallel", "chunkwise"}}.get(op, {"recurrent"}) <= table.keys()
    assert None in table.values()
    for refusal in table.values():
        assert refusal is None or len(refusal.split()) > 3


@pytest.mark.parametrize("op", PRIMARY)
def test_unknown_implementation_raises_an_error_with_the_known_names(op):
    with pytest.raises(ValueError, match=r"implementation='fastest'.*not known.*'auto'") as error:
        runs.OPS[op](**arguments(op), implementation="fastest")
    for name in ops.implementations(op):
        assert name in str(error.value)


@pytest.mark.parametrize("op", PRIMARY)
def test_named_implementation_that_does_not_support_a_call_raises_its_reason(op):
    for name, refusal in ops.implementations(op).items():
        if refusal is not None:
            with pytest.raises(NotImplementedError, match=name) as error:
                runs.OPS[op](**arguments(op), implementation=name)
            assert refusal in str(error.value)


CALL = dispatch.Call(1, 2, 3, 4, 5, jnp.dtype("float32"), "cpu")
UNSUPPORTED = dispatch.Implementation(lambda: "first", lambda call: f"it needs K = 8, got {call.K}")
SUPPORTED = dispatch.Implementation(lambda: "second")


def test_only_auto_falls_through_to_a_supported_implementation():
    table = {"first": UNSUPPORTED, "second": SUPPORTED}
    assert dispatch.choose("op", table, "auto", CALL).fn() == "second"
    with pytest.raises(NotImplementedError, match="first: it needs K = 8, got 4"):
        dispatch.choose("op", table, "first", CALL)


def test_auto_raises_all_reasons_if_no_implementation_supports_the_call():
    table = {"first": UNSUPPORTED, "second": dataclasses.replace(UNSUPPORTED)}
    with pytest.raises(NotImplementedError, match=r"first: it needs.*second: it needs"):
        dispatch.choose("op", table, "auto", CALL)


def test_implementations_of_an_unknown_op_raises_an_error_with_the_known_names():
    with pytest.raises(ValueError, match=r"(?s)convolution.*lstm"):
        ops.implementations("convolution")


WRONG_SHAPES = [
    ("mlstm", "q", (B, 5, H)),
    ("mlstm", "k", (B, 5, H, K + 1)),
    ("mlstm", "v", (B, 6, H, V)),
    ("mlstm", "i", (B, 5, H + 1)),
    ("mlstm", "f", (B, 5, 1)),
    ("slstm", "x", (B, 5, 3, H, K)),
    ("slstm", "r", (H, K, 4, K + 1)),
    ("slstm", "b", (4, H, K)),
    ("lstm", "x", (B, 5, 4, H)),
    ("lstm", "r", (H + 1, K, 4, K)),
]


@pytest.mark.parametrize("op,name,shape", WRONG_SHAPES)
def test_wrong_shape_raises_an_error_with_the_argument_and_its_axes(unchecked, op, name, shape):
    args = {**arguments(op), name: jnp.zeros(shape)}
    with pytest.raises(ValueError, match=rf"^{op}: `{name}` must have the axes .*shape") as error:
        runs.OPS[op](**args)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("flag", ["reset", "mask"])
@pytest.mark.parametrize("op", PRIMARY)
def test_flags_of_wrong_length_raise_an_error_with_their_name(unchecked, op, flag):
    with pytest.raises(ValueError, match=rf"`{flag}`.*\(B T\).*T=5.*\({B}, 4\)"):
        runs.OPS[op](**arguments(op), **{flag: jnp.ones((B, 4), bool)})


@pytest.mark.parametrize("op", PRIMARY)
def test_state_of_wrong_batch_size_raises_an_error_with_its_name(unchecked, op):
    state = jax.tree.map(lambda x: jnp.asarray(x[:1], jnp.float32), make_case(op, 5).state)
    with pytest.raises(ValueError, match=rf"`state\.\w+`.*B={B}"):
        runs.OPS[op](**arguments(op), state=state)


@pytest.mark.parametrize("op", PRIMARY)
def test_empty_sequence_raises_an_error(unchecked, op):
    args = {name: x[:, :0] if name not in ("r", "b") else x for name, x in arguments(op).items()}
    with pytest.raises(ValueError, match="T must be at least 1, got 0"):
        runs.OPS[op](**args)


@pytest.mark.parametrize("chunk_size", [0, -8])
def test_chunk_size_below_one_raises_an_error_with_a_fix(chunk_size):
    with pytest.raises(ValueError, match=rf"chunk_size.*at least 1.*{chunk_size}.*None"):
        ops.mlstm(**arguments("mlstm"), chunk_size=chunk_size)


@pytest.mark.parametrize("name", ["input_gate", "forget_gate"])
def test_normalize_false_needs_sigmoid_gates(name):
    gates = {"input_gate": "sigmoid", "forget_gate": "sigmoid", name: "exp"}
    with pytest.raises(ValueError, match=rf"normalize=False.*{name}='sigmoid'.*'exp'"):
        ops.mlstm(**arguments("mlstm"), normalize=False, **gates)


def test_unknown_gate_raises_an_error_with_the_known_names():
    with pytest.raises(ValueError, match=r"input_gate.*'exp'.*'sigmoid'.*'relu'"):
        ops.mlstm(**arguments("mlstm"), input_gate="relu")
    for op in ("mlstm", "slstm"):
        with pytest.raises(ValueError, match=r"forget_gate.*'sigmoid'.*'exp'.*'relu'"):
            runs.OPS[op](**arguments(op), forget_gate="relu")


@pytest.mark.parametrize("T", [1, L])
def test_auto_selects_an_implementation_for_any_length(T):
    for op in PRIMARY:
        h, _ = jax.eval_shape(runs.OPS[op], **arguments(op, T))
        assert h.shape[:2] == (B, T)


def test_variants_are_named_after_ops():
    assert {Subject(variant, "").op for variant in OPTIONS} == set(runs.OPS)
