"""The chunked cross entropy equals the naive one, and never has the full logits in memory."""

import functools

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType

from tests import quick
from xlstm_jax import ops
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.cross_entropy import token_losses

B, T, D, VOCAB = 2, 7, 5, 11


def make(rng, dtype="float64"):
    """x, kernel, targets, weights; some weights are 0, the others differ."""
    weights = np.where(rng.random((B, T)) < 0.3, 0.0, rng.random((B, T)) + 0.5)
    return (
        jnp.asarray(3 * rng.standard_normal((B, T, D)), dtype),
        jnp.asarray(rng.standard_normal((D, VOCAB)), dtype),
        jnp.asarray(rng.integers(0, VOCAB, (B, T))),
        jnp.asarray(weights, "float32" if dtype == "bfloat16" else dtype),
    )


CALL = quick.jit(ops.cross_entropy, static_argnames=("soft_cap", "z_loss", "chunk_size"))


def naive(x, kernel, targets, weights, soft_cap=None, z_loss=0.0):
    """The definition, with the full logits."""
    logits = x @ kernel
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    log_norm = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = jnp.argmax(logits, axis=-1) == targets
    return ops.CrossEntropy(
        jnp.sum(weights * (log_norm - picked)),
        jnp.sum(weights * z_loss * log_norm**2),
        jnp.sum(weights),
        jnp.sum(weights * correct),
    )


def values_and_gradients(call, args):
    """All four sums, and the gradients of a combination of the first two by x and kernel."""

    def loss(x, kernel):
        sums = call(x, kernel, *args[2:])
        return sums.ce_sum + 0.7 * sums.z_sum, sums

    step = quick.jit(jax.grad(loss, (0, 1), has_aux=True))
    gradients, sums = step(*args[:2])
    return sums, gradients


@pytest.mark.parametrize(
    "options", [{}, {"soft_cap": 4.0, "z_loss": 1e-2}], ids=["plain", "capped"]
)
def test_any_chunk_size_equals_the_full_logits(options, rng, x64):
    args = make(rng)
    expected = values_and_gradients(lambda *a: naive(*a, **options), args)
    for chunk_size in (None, 1, 3, 7):
        chunked = lambda *a: ops.cross_entropy(*a, chunk_size=chunk_size, **options)  # noqa: B023, E731
        actual = values_and_gradients(chunked, args)
        chex.assert_trees_all_close(actual, expected, rtol=1e-11, atol=1e-13)


def test_position_of_weight_zero_has_no_effect(rng):
    x, kernel, targets, weights = make(rng, "float32")
    sums, (dx, _) = values_and_gradients(
        lambda *a: ops.cross_entropy(*a, chunk_size=4), (x, kernel, targets, weights)
    )
    is_zero = np.asarray(weights) == 0
    assert is_zero.any() and not np.asarray(dx)[is_zero].any()
    other_targets = jnp.where(is_zero, (targets + 1) % VOCAB, targets)
    actual = CALL(x, kernel, other_targets, weights, chunk_size=4)
    np.testing.assert_allclose(actual, sums, rtol=1e-6)


def test_sums_of_bfloat16_inputs_are_float32_and_accurate(rng):
    args = make(rng, "bfloat16")
    sums = CALL(*args, z_loss=1e-2, chunk_size=4)
    assert {leaf.dtype for leaf in sums} == {jnp.dtype("float32")}
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), args[:2])
    exact = quick.jit(functools.partial(naive, z_loss=1e-2))(*wide, *args[2:])
    np.testing.assert_allclose(sums.ce_sum, exact.ce_sum, rtol=1e-2)


def test_first_of_equal_logits_is_the_prediction():
    """Two tokens have equal logits, a third a smaller one."""
    x, kernel = jnp.ones((1, 3, 1)), jnp.asarray([[2.0, 1.0, 2.0]])
    targets, weights = jnp.asarray([[0, 1, 2]]), jnp.asarray([[1.0, 10.0, 100.0]])
    assert float(CALL(x, kernel, targets, weights).correct_sum) == 1.0


def test_large_logits_give_finite_sums_and_gradients(rng):
    x, kernel, targets, weights = make(rng, "float32")
    sums, gradients = values_and_gradients(
        lambda *a: ops.cross_entropy(*a, chunk_size=4), (1e3 * x, kernel, targets, weights)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((sums, gradients)))


def largest_array(closed) -> int:
    """Number of elements of the largest array of a jaxpr, nested jaxprs included."""
    largest, programs = 0, [closed.jaxpr]
    while programs:
        program = programs.pop()
        for equation in program.eqns:
            largest = max([largest, *(v.aval.size for v in equation.outvars)])
            programs += jax.extend.core.jaxprs_in_params(equation.params)
    return largest


LARGE = dict(batch=4, steps=64, dim=8, vocab=256)


def gradient_of(chunk_size):
    """The gradient function of a call whose full logits are by far its largest array."""
    b, t, d, vocab = LARGE.values()
    args = (
        jax.ShapeDtypeStruct((b, t, d), jnp.float32),
        jax.ShapeDtypeStruct((d, vocab), jnp.float32),
        jax.ShapeDtypeStruct((b, t), jnp.int32),
        jax.ShapeDtypeStruct((b, t), jnp.float32),
    )

    def loss(x, kernel, targets, weights):
        return ops.cross_entropy(x, kernel, targets, weights, chunk_size=chunk_size).ce_sum

    return jax.grad(loss, (0, 1)), args


def test_full_logits_are_never_computed_forward_or_backward():
    b, t, _, vocab = LARGE.values()
    gradient, args = gradient_of(32)
    assert largest_array(jax.make_jaxpr(gradient)(*args)) <= 32 * vocab
    gradient, args = gradient_of(b * t)  # a single chunk: the check detects full logits
    assert largest_array(jax.make_jaxpr(gradient)(*args)) >= b * t * vocab


def test_temporary_memory_shrinks_with_the_chunk_size():
    def temp_bytes(chunk_size):
        gradient, args = gradient_of(chunk_size)
        return jax.jit(gradient).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(16) < temp_bytes(LARGE["batch"] * LARGE["steps"]) / 3


@pytest.fixture
def unchecked():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    "argument,shape",
    [
        (0, (B, T)),
        (1, (D + 1, VOCAB)),
        (2, (B, T + 1)),
        (3, (B,)),
    ],
)
def test_wrong_shape_raises_an_error_with_the_argument(unchecked, argument, shape, rng):
    args = list(make(rng, "float32"))
    args[argument] = jnp.zeros(shape, args[argument].dtype)
    name = ("x", "kernel", "targets", "weights")[argument]
    with pytest.raises(ValueError, match=rf"`{name}` must .*shape") as error:
        ops.cross_entropy(*args)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_below_one_raises_an_error_with_a_fix(chunk_size, rng):
    with pytest.raises(ValueError, match=rf"chunk_size.*at least 1.*{chunk_size}.*None"):
        ops.cross_entropy(*make(rng, "float32"), chunk_size=chunk_size)


@pytest.mark.parametrize("platform,chunks", [("cpu", 205), ("tpu", 4), ("gpu", 4)])
def test_chunks_on_accelerators_have_a_thousand_positions(platform, chunks, monkeypatch):
    """Smaller chunks would be bound by reading weights; 4,096 positions of 50,304 logits."""
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
    args = shape(2, 2048, 8), shape(8, 50304), shape(2, 2048, dtype=jnp.int32), shape(2, 2048)
    program = str(jax.make_jaxpr(lambda *args: ops.cross_entropy(*args))(*args))
    assert f"length={chunks}\n" in program


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_losses_of_positions_sum_to_the_cross_entropy(chunk_size, soft_cap, rng, x64):
    x, kernel, targets, weights = make(rng)
    call = quick.jit(token_losses, static_argnames=("soft_cap", "chunk_size"))
    losses = call(x, kernel, targets, soft_cap=soft_cap, chunk_size=chunk_size)
    sums = naive(x, kernel, targets, weights, soft_cap)
    np.testing.assert_allclose((losses.nats * weights).sum(), sums.ce_sum, rtol=1e-12)
    np.testing.assert_allclose((losses.correct * weights).sum(), sums.correct_sum, rtol=1e-12)
    assert losses.nats.shape == losses.correct.shape == (B, T)


@pytest.mark.parametrize("length", [4, 8])
def test_sums_over_shards_of_time_and_of_features_equal_one_device(length, rng):
    """The axis of features shards time further only if that leaves equal parts."""
    shapes = (1, length, D), (D, VOCAB), (1, length)
    x, kernel, weights = (jnp.float32(rng.standard_normal(shape)) for shape in shapes)
    args = x, kernel, jnp.asarray(rng.integers(0, VOCAB, (1, length))), weights
    expected = values_and_gradients(ops.cross_entropy, args)
    with jax.set_mesh(jax.make_mesh((2, 4), ("seq", "tensor"), axis_types=(AxisType.Auto,) * 2)):
        actual = values_and_gradients(ops.cross_entropy, args)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
