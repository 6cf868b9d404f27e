"""Context parallelism: sharding the sequence does not change results."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import quick
from tests.ops.subjects import RANGE_F, RANGE_I, RANGE_LOG_F, replace_third
from tests.ops.tolerances import TABLE, assert_close, assert_gradients_close
from xlstm_jax import cells, ops
from xlstm_jax.ops.mlstm import context_parallel
from xlstm_jax.sharding import make_mesh, use_rules
from xlstm_jax.sharding.mesh import build_mesh

B, T, H, K, V = 2, 48, 2, 8, 8
VARIANTS = {
    "exp": functools.partial(ops.mlstm, chunk_size=4),
    "exp forget gate": functools.partial(ops.mlstm, chunk_size=4, forget_gate="exp"),
    "sigmoid": functools.partial(ops.mlstm, chunk_size=4, input_gate="sigmoid"),
    "unnormalized": functools.partial(
        ops.mlstm, chunk_size=4, input_gate="sigmoid", normalize=False
    ),
}
SEQ_8 = make_mesh(data=1, seq=8)
EXCHANGES = {"all-gather": 16, "doubling": 1}
"""Collective that exchanges summaries -> the value of `ALL_GATHER_SHARDS` that selects it."""


@pytest.fixture
def exchange(request, monkeypatch):
    name = getattr(request, "param", "all-gather")
    monkeypatch.setattr(context_parallel, "ALL_GATHER_SHARDS", EXCHANGES[name])
    return name


def make_flags(kind: str, rng):
    """Resets at shard boundaries (multiples of 6), next to them or anywhere, and masked steps."""
    reset, mask = np.zeros((B, T), bool), np.ones((B, T), bool)
    if kind in ("boundaries", "everything"):
        reset[0, [6, 11, 12, 18, 19, 47]] = True
        reset[1, [0, 30, 42]] = True
    if kind in ("random", "everything"):
        reset |= rng.random((B, T)) < 0.1
    if kind in ("masks", "everything"):
        mask = rng.random((B, T)) < 0.7
        mask[0, 12:25] = False  # two full shards, and part of a third
    return {"reset": jnp.asarray(reset), "mask": jnp.asarray(mask)}


FLAG_KINDS = ("boundaries", "random", "masks", "everything")


def evaluate(op, inputs, state, flags, cotangents):
    """Outputs and gradients of an op."""
    run = lambda inputs, state: op(**inputs, state=state, **flags)  # noqa: E731
    (y, last), pullback = jax.vjp(run, inputs, state)
    return (y, last), pullback(cotangents)


def compiled(op):
    return quick.jit(functools.partial(evaluate, op))


@functools.cache
def single_device(op):
    """The program for one device; the cache shares it between tests."""
    return compiled(op)


@functools.cache
def sharded(op, mesh, exchange):
    """The program under the rules `fsdp_seq`; `exchange`, set by its fixture, is only a key."""
    program = compiled(op)

    def run(*args):
        with use_rules("fsdp_seq", replicated=("tensor",)), jax.set_mesh(mesh):
            return program(*args)

    return run


def run_sharded(op, mesh, *args, exchange="all-gather"):
    return sharded(op, mesh, exchange)(*args)


def mlstm_call(rng, T=T, gate_scale=1.0):
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    inputs = {name: normal(B, T, H, K) for name in "qkv"}
    inputs |= {"i": gate_scale * normal(B, T, H), "f": gate_scale * normal(B, T, H) + 2}
    state = cells.MLSTMState(normal(B, H, K, V), normal(B, H, K), normal(B, H))
    return inputs, state, (normal(B, T, H, V), jax.tree.map(jnp.ones_like, state))


def assert_same_results(actual, expected):
    tol = TABLE["float32"]
    (y, last), (inputs, initial) = expected
    for name, value, expected_value in (("y", actual[0][0], y), *_leaves(actual[0][1], last)):
        assert_close(np.asarray(value), np.asarray(expected_value, np.float64), tol.h, name)
    expected_grads = {n: np.asarray(x, np.float64) for n, x in inputs.items()}
    expected_grads |= {n: np.asarray(x, np.float64) for n, _, x in _leaves(initial, initial)}
    grads = {n: np.asarray(x) for n, x in actual[1][0].items()}
    grads |= {n: np.asarray(x) for n, x, _ in _leaves(actual[1][1], initial)}
    assert_gradients_close(grads, expected_grads, tol)


def _leaves(a, b):
    return zip(a._fields, jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant,exchange",
    [
        ("exp", "all-gather"),
        ("exp", "doubling"),
        ("exp forget gate", "all-gather"),
        ("exp forget gate", "doubling"),
        ("sigmoid", "doubling"),
        ("unnormalized", "all-gather"),
    ],
    indirect=["exchange"],
)
def test_eight_shards_match_a_single_device(variant, exchange, rng):
    """For all kinds of flags; gradient errors are below 1e-5 of the largest gradient."""
    inputs, state, cotangents = mlstm_call(rng)
    inputs["f"] -= 3 * (variant == "exp forget gate")  # mostly below 1
    op = VARIANTS[variant]
    for kind in FLAG_KINDS:
        args = inputs, state, make_flags(kind, rng), cotangents
        expected = single_device(op)(*args)
        actual = run_sharded(op, SEQ_8, *args, exchange=exchange)
        assert_same_results(actual, expected)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
        chex.assert_trees_all_close(actual[1], expected[1], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("exchange", EXCHANGES, indirect=True)
@pytest.mark.parametrize("variant", ["exp", "exp forget gate"])
def test_gates_from_minus_infinity_to_1e30_match_a_single_device(variant, exchange, rng):
    inputs, state, cotangents = mlstm_call(rng)
    inputs["f"] -= 3 * (variant == "exp forget gate")  # mostly below 1
    for name, values in (("i", RANGE_I), ("f", RANGE_F if variant == "exp" else RANGE_LOG_F)):
        gate = np.array(inputs[name])
        replace_third(rng, gate, values)
        inputs[name] = jnp.asarray(gate)
    inputs["i"] = inputs["i"].at[0, :14].set(-jnp.inf)  # two full shards, and part of a third
    args = inputs, state, make_flags("random", rng), cotangents
    op = VARIANTS[variant]
    expected = single_device(op)(*args)
    assert_same_results(run_sharded(op, SEQ_8, *args, exchange=exchange), expected)


@pytest.mark.parametrize("names", [(), ("reset",)], ids=["no flags", "resets only"])
def test_flags_are_optional(names, rng):
    inputs, state, cotangents = mlstm_call(rng)
    keywords = {name: make_flags("boundaries", rng)[name] for name in names}
    args = inputs, state, keywords, cotangents
    assert_same_results(run_sharded(ops.mlstm, SEQ_8, *args), single_device(ops.mlstm)(*args))


@pytest.mark.parametrize("exchange", ["doubling"], indirect=True)
def test_number_of_shards_need_not_be_a_power_of_two(exchange, rng):
    inputs, state, cotangents = mlstm_call(rng)
    args = inputs, state, make_flags("boundaries", rng), cotangents
    mesh = build_mesh(jax.devices()[:6], dict(data=1, fsdp=1, seq=6, tensor=1))
    actual = run_sharded(VARIANTS["exp"], mesh, *args, exchange=exchange)
    assert_same_results(actual, single_device(VARIANTS["exp"])(*args))


@pytest.mark.parametrize("implementation", ["parallel", "recurrent"])
def test_every_implementation_supports_a_sharded_sequence(implementation, rng):
    inputs, state, cotangents = mlstm_call(rng)
    args = inputs, state, make_flags("everything", rng), cotangents
    op = functools.partial(ops.mlstm, implementation=implementation)
    actual = run_sharded(op, make_mesh(data=2, seq=4), *args)
    assert_same_results(actual, single_device(VARIANTS["exp"])(*args))


@pytest.mark.parametrize("exchange", EXCHANGES, indirect=True)
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_eight_shards_match_a_single_device_for_large_gates(scale, exchange, rng):
    op = VARIANTS["exp"]
    inputs, state, cotangents = mlstm_call(rng, gate_scale=scale)
    zeros = jax.tree.map(jnp.zeros_like, state)
    args = inputs, state, make_flags("random", rng), (cotangents[0], zeros)
    expected, actual = single_device(op)(*args), run_sharded(op, SEQ_8, *args, exchange=exchange)
    tol = TABLE["float32, large gates"]
    assert_close(np.asarray(actual[0][0]), np.asarray(expected[0][0], np.float64), tol.h, "h")
    chex.assert_tree_all_finite(actual)


def test_long_shards_match_a_single_device(rng):
    """Shards are longer than `GATE_CHUNK` and not a multiple of it."""
    inputs, state, cotangents = mlstm_call(rng, T=2 * 700)
    reset = jnp.asarray(rng.random((B, 1400)) < 0.002)
    args = inputs, state, {"reset": reset}, cotangents
    actual = run_sharded(ops.mlstm, make_mesh(data=4, seq=2), *args)
    assert_same_results(actual, single_device(ops.mlstm)(*args))


def conv_call(rng, T=T, W=4, mixing=False):
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    kernel = normal(W, 6, 6) if mixing else normal(W, 6)
    inputs = {"x": normal(B, T, 6), "kernel": kernel, "bias": normal(6)}
    return inputs, normal(B, W - 1, 6), (normal(B, T, 6), normal(B, W - 1, 6))


CONVOLUTIONS = {
    "plain": ({}, ()),
    "resets": ({}, ("reset",)),
    "masks": ({}, ("reset", "mask")),
    "mixing": ({"mixing": True}, ("reset", "mask")),
    "one tap": ({"W": 1}, ("reset", "mask")),
    "windows longer than shards": ({"W": 9}, ("reset",)),
}


@pytest.mark.parametrize("options,names", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_crosses_shard_boundaries(options, names, rng):
    inputs, state, cotangents = conv_call(rng, **options)
    for kind in FLAG_KINDS if names else ("random",):
        keywords = {name: make_flags(kind, rng)[name] for name in names}
        args = inputs, state, keywords, cotangents
        expected = single_device(ops.causal_conv)(*args)
        actual = run_sharded(ops.causal_conv, SEQ_8, *args)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            largest = float(np.max(np.abs(b), initial=1.0))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["slstm", "lstm"])
def test_slstm_and_lstm_support_a_sharded_sequence(name, rng):
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    inputs = {"x": normal(B, T, 4, H, K), "r": 0.2 * normal(H, K, 4, K), "b": normal(H, 4, K)}
    state_type = {"slstm": cells.SLSTMState, "lstm": cells.LSTMState}[name]
    leaves = {leaf: 1 + jnp.abs(normal(B, H, K)) for leaf in state_type._fields}
    state = state_type(**leaves)
    args = inputs, state, make_flags("everything", rng), (normal(B, T, H, K), state)
    op = getattr(ops, name)
    actual = run_sharded(op, make_mesh(data=2, seq=2, tensor=2), *args)
    assert_same_results(actual, single_device(op)(*args))


def test_indivisible_length_gives_the_same_results(rng):
    inputs, state, cotangents = mlstm_call(rng, T=13)
    args = inputs, state, {}, cotangents
    actual = run_sharded(ops.mlstm, SEQ_8, *args)
    assert_same_results(actual, single_device(ops.mlstm)(*args))


def test_batch_heads_and_time_are_sharded_together(rng):
    """Without `use_rules`, the default rules shard all three."""
    inputs, state, cotangents = mlstm_call(rng)
    args = inputs, state, make_flags("random", rng), cotangents
    with jax.set_mesh(make_mesh(data=2, seq=2, tensor=2)):
        program = compiled(VARIANTS["exp"]).lower(*args).compile()
        actual = program(*args)
    assert_same_results(actual, single_device(VARIANTS["exp"])(*args))
    assert f"f32[1,{T // 2},1,{K}]" in program.as_text()


COLLECTIVE = re.compile(
    r"= (\S+) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)\("
)


def collectives_of(op, mesh, *args):
    """Shape and kind of every collective in the compiled program."""
    with use_rules("fsdp_seq", replicated=("tensor",)), jax.set_mesh(mesh):
        text = quick.jit(op).lower(*args).compile().as_text()
    return sorted(COLLECTIVE.findall(text))


@pytest.mark.slow
def test_communication_does_not_grow_with_sequence_length(rng):
    """The only collective of the forward pass is one all-gather of summaries."""
    mesh, collectives = SEQ_8, {}
    for length in (T, 8 * T):
        inputs, _, _ = mlstm_call(rng, T=length)
        inputs = jax.device_put(inputs, NamedSharding(mesh, P(None, "seq")))
        loss = lambda inputs: jnp.sum(ops.mlstm(**inputs)[0])  # noqa: E731
        collectives[length] = collectives_of(jax.grad(loss), mesh, inputs)
    assert collectives[T] == collectives[8 * T]
    ((shape, kind),) = collectives_of(lambda inputs: ops.mlstm(**inputs)[0], mesh, inputs)
    summary_size = K * V + K + 2
    assert kind == "all-gather" and shape.startswith(f"f32[8,{B},{H},{summary_size}]")
