"""The sequence sharded over devices: they exchange summaries, and all results stay the same."""

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
from tests.ops.tolerances import TABLE, assert_close, assert_gradients_close
from xlstm_jax import cells, ops
from xlstm_jax.ops.mlstm import context_parallel
from xlstm_jax.sharding import get_rules, make_mesh, use_rules
from xlstm_jax.sharding.mesh import build_mesh

B, T, H, K, V = 2, 48, 2, 8, 8
VARIANTS = {
    "exp": functools.partial(ops.mlstm, chunk_size=4),
    "sigmoid": functools.partial(ops.mlstm, chunk_size=4, input_gate="sigmoid"),
    "unnormalized": functools.partial(
        ops.mlstm, chunk_size=4, input_gate="sigmoid", normalize=False
    ),
}
SEQ_8 = make_mesh(data=1, seq=8)
EXCHANGES = {"all-gather": 16, "doubling": 1}
"""How summaries are exchanged, by the largest number of shards for which they are all-gathered."""


both_exchanges = pytest.mark.parametrize("exchange", EXCHANGES, indirect=True)


@pytest.fixture
def exchange(request, monkeypatch):
    name = getattr(request, "param", "all-gather")
    monkeypatch.setattr(context_parallel, "ALL_GATHER_SHARDS", EXCHANGES[name])
    return name


def flags(kind: str, rng):
    """Resets on the borders of shards of 6, beside them, and anywhere; and masked steps."""
    reset, mask = np.zeros((B, T), bool), np.ones((B, T), bool)
    if kind in ("borders", "everything"):
        reset[0, [6, 11, 12, 18, 19, 47]] = True
        reset[1, [0, 30, 42]] = True
    if kind in ("random", "everything"):
        reset |= rng.random((B, T)) < 0.1
    if kind in ("masks", "everything"):
        mask = rng.random((B, T)) < 0.7
        mask[0, 12:25] = False  # two whole shards, and a part of a third
    return {"reset": jnp.asarray(reset), "mask": jnp.asarray(mask)}


KINDS = ("borders", "random", "masks", "everything")


def evaluate(op, inputs, state, flags, cotangents):
    """What an op returns and all gradients."""
    run = lambda inputs, state: op(**inputs, state=state, **flags)  # noqa: E731
    (y, last), pull = jax.vjp(run, inputs, state)
    return (y, last), pull(cotangents)


def compiled(op):
    return quick.jit(functools.partial(evaluate, op))


@functools.cache
def alone(op):
    """On one device; one program serves all tests."""
    return compiled(op)


@functools.cache
def sharded(op, exchange, mesh):
    """A program by the rules of `fsdp_seq`; one serves all tests that exchange summaries alike."""
    program = compiled(op)

    def run(*args):
        with use_rules(get_rules("fsdp_seq")), jax.set_mesh(mesh):
            return program(*args)

    return run


def on_a_mesh(op, mesh, *args, exchange="all-gather"):
    return sharded(op, exchange, mesh)(*args)


def mlstm_call(rng, T=T, gate_scale=1.0):
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    inputs = {name: normal(B, T, H, K) for name in "qkv"}
    inputs |= {"i": gate_scale * normal(B, T, H), "f": gate_scale * normal(B, T, H) + 2}
    state = cells.MLSTMState(normal(B, H, K, V), normal(B, H, K), normal(B, H))
    return inputs, state, (normal(B, T, H, V), jax.tree.map(jnp.ones_like, state))


def assert_the_same(actual, expected):
    row = TABLE["float32"]
    (y, last), (inputs, first) = expected
    for name, found, value in (("y", actual[0][0], y), *_leaves(actual[0][1], last)):
        assert_close(np.asarray(found), np.asarray(value, np.float64), row.h, name)
    gradients = {n: np.asarray(x, np.float64) for n, x in inputs.items()}
    gradients |= {n: np.asarray(x, np.float64) for n, _, x in _leaves(first, first)}
    found = {n: np.asarray(x) for n, x in actual[1][0].items()}
    found |= {n: np.asarray(x) for n, x, _ in _leaves(actual[1][1], first)}
    assert_gradients_close(found, gradients, row)


def _leaves(a, b):
    names = a._fields if hasattr(a, "_fields") else ("state",)
    return zip(names, jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


@pytest.mark.parametrize(
    "variant,exchange",
    [
        ("exp", "all-gather"),
        ("exp", "doubling"),
        ("sigmoid", "doubling"),
        ("unnormalized", "all-gather"),
    ],
    indirect=["exchange"],
)
def test_shards_of_eight_devices_equal_one_sequence(variant, exchange, rng):
    """Whatever is reset or masked; gradients to a hundred-thousandth of the largest."""
    inputs, state, cotangents = mlstm_call(rng)
    op = VARIANTS[variant]
    for kind in KINDS:
        args = inputs, state, flags(kind, rng), cotangents
        found, expected = on_a_mesh(op, SEQ_8, *args, exchange=exchange), alone(op)(*args)
        assert_the_same(found, expected)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
        chex.assert_trees_all_close(found[1], expected[1], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("given", [(), ("reset",)], ids=["no flags", "resets alone"])
def test_flags_may_be_left_out(given, rng):
    inputs, state, cotangents = mlstm_call(rng)
    keywords = {name: flags("borders", rng)[name] for name in given}
    args = inputs, state, keywords, cotangents
    assert_the_same(on_a_mesh(ops.mlstm, SEQ_8, *args), alone(ops.mlstm)(*args))


@pytest.mark.parametrize("exchange", ["doubling"], indirect=True)
def test_any_number_of_devices_may_share_a_sequence(exchange, rng):
    inputs, state, cotangents = mlstm_call(rng)
    args = inputs, state, flags("borders", rng), cotangents
    mesh = build_mesh(jax.devices()[:6], dict(data=1, fsdp=1, seq=6, tensor=1))
    found = on_a_mesh(VARIANTS["exp"], mesh, *args, exchange=exchange)
    assert_the_same(found, alone(VARIANTS["exp"])(*args))


@pytest.mark.parametrize("implementation", ["parallel", "recurrent"])
def test_every_implementation_is_sharded(implementation, rng):
    inputs, state, cotangents = mlstm_call(rng)
    args = inputs, state, flags("everything", rng), cotangents
    op = functools.partial(ops.mlstm, implementation=implementation)
    found = on_a_mesh(op, make_mesh(data=2, seq=4), *args)
    assert_the_same(found, alone(VARIANTS["exp"])(*args))


@both_exchanges
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_gates_of_any_scale_keep_their_digits(scale, exchange, rng):
    op = VARIANTS["exp"]
    inputs, state, cotangents = mlstm_call(rng, gate_scale=scale)
    zeros = jax.tree.map(jnp.zeros_like, state)
    args = inputs, state, flags("random", rng), (cotangents[0], zeros)
    expected, found = alone(op)(*args), on_a_mesh(op, SEQ_8, *args, exchange=exchange)
    row = TABLE["float32, large gates"]
    assert_close(np.asarray(found[0][0]), np.asarray(expected[0][0], np.float64), row.h, "h")
    chex.assert_tree_all_finite(found)


def test_long_shards_equal_one_sequence(rng):
    """Longer than the chunks in which gates are summed, which do not divide them."""
    inputs, state, cotangents = mlstm_call(rng, T=2 * 700)
    reset = jnp.asarray(rng.random((B, 1400)) < 0.002)
    args = inputs, state, {"reset": reset}, cotangents
    found = on_a_mesh(ops.mlstm, make_mesh(data=4, seq=2), *args)
    assert_the_same(found, alone(ops.mlstm)(*args))


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


@pytest.mark.parametrize("options,given", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_reaches_over_the_borders_of_shards(options, given, rng):
    inputs, state, cotangents = conv_call(rng, **options)
    for kind in KINDS if given else ("random",):
        keywords = {name: flags(kind, rng)[name] for name in given}
        args = inputs, state, keywords, cotangents
        expected = alone(ops.causal_conv)(*args)
        found = on_a_mesh(ops.causal_conv, SEQ_8, *args)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            largest = float(np.max(np.abs(b), initial=1.0))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["slstm", "lstm"])
def test_time_is_all_gathered_where_a_recurrence_cannot_shard_it(name, rng):
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    inputs = {"x": normal(B, T, 4, H, K), "r": 0.2 * normal(H, K, 4, K), "b": normal(H, 4, K)}
    kind = {"slstm": cells.SLSTMState, "lstm": cells.LSTMState}[name]
    leaves = {leaf: 1 + jnp.abs(normal(B, H, K)) for leaf in kind._fields}
    state = kind(**leaves)
    args = inputs, state, flags("everything", rng), (normal(B, T, H, K), state)
    op = getattr(ops, name)
    found = on_a_mesh(op, make_mesh(data=2, seq=2, tensor=2), *args)
    assert_the_same(found, alone(op)(*args))


def test_lengths_that_devices_do_not_divide_are_replicated(rng):
    inputs, state, cotangents = mlstm_call(rng, T=13)
    args = inputs, state, {}, cotangents
    found = on_a_mesh(ops.mlstm, SEQ_8, *args)
    assert_the_same(found, alone(ops.mlstm)(*args))


def test_batch_heads_and_time_are_sharded_at_once(rng):
    """Where no table of rules is in use, every axis that the mesh has a name for is sharded."""
    inputs, state, cotangents = mlstm_call(rng)
    args = inputs, state, flags("random", rng), cotangents
    with jax.set_mesh(make_mesh(data=2, seq=2, tensor=2)):
        program = compiled(VARIANTS["exp"]).lower(*args).compile()
        found = program(*args)
    assert_the_same(found, alone(VARIANTS["exp"])(*args))
    assert f"f32[1,{T // 2},1,{K}]" in program.as_text()


COLLECTIVE = re.compile(
    r"= (\S+) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)\("
)


def exchanged(op, mesh, *args):
    """Every collective in the program of an op's results: its kind, and the shape."""
    with use_rules(get_rules("fsdp_seq")), jax.set_mesh(mesh):
        text = quick.jit(op).lower(*args).compile().as_text()
    return sorted(COLLECTIVE.findall(text))


def test_devices_exchange_one_summary_whatever_the_length(rng):
    """Forward; what the gradient adds, too, does not grow with the length."""
    mesh, found = SEQ_8, {}
    for length in (T, 8 * T):
        inputs, _, _ = mlstm_call(rng, T=length)
        inputs = jax.device_put(inputs, NamedSharding(mesh, P(None, "seq")))
        loss = lambda inputs: jnp.sum(ops.mlstm(**inputs)[0])  # noqa: E731
        found[length] = exchanged(jax.grad(loss), mesh, inputs)
    assert found[T] == found[8 * T]
    ((shape, kind),) = exchanged(lambda inputs: ops.mlstm(**inputs)[0], mesh, inputs)
    numbers = K * V + K + 2
    assert kind == "all-gather" and shape.startswith(f"f32[8,{B},{H},{numbers}]")
