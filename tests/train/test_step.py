"""The train step: token means under accumulation, the guard, dropout keys and metrics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlstm_jax.data import Batch
from xlstm_jax.modules import LM, LMConfig
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.train import TrainConfig, guard, init_state, make_optimizer, make_train_step
from xlstm_jax.train.step import sum_gradients

PLAIN = TrainConfig(steps=20, warmup_steps=0, schedule="constant", lr=0.1, grad_clip=0.1)


@pytest.fixture
def start(tiny, tokens):
    """The initial state, which does not depend on the config."""
    return _first_state(tiny, tokens.shape)


@functools.cache
def _first_state(model, shape):
    tokens = jnp.zeros(shape, jnp.int32)
    return init_state(model, make_optimizer(PLAIN), jax.random.key(0), tokens)


@functools.cache
def stepper(model, cfg=PLAIN):
    return jax.jit(make_train_step(model, make_optimizer(cfg), cfg))


def test_the_loss_is_the_mean_over_tokens(tiny, start, batches):
    batch, state = batches(), start
    _, metrics = stepper(tiny)(state, batch)
    logits, _ = tiny.apply({"params": state.params}, batch.inputs)
    ce = -jax.nn.log_softmax(logits)[
        np.arange(8)[:, None], np.arange(12)[None], np.asarray(batch.targets)
    ]
    mean = (ce * batch.weights).sum() / batch.weights.sum()
    np.testing.assert_allclose(metrics["loss"], mean, rtol=1e-6)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(mean), rtol=1e-6)
    correct = (logits.argmax(-1) == batch.targets) * batch.weights
    np.testing.assert_allclose(metrics["accuracy"], correct.sum() / batch.weights.sum(), rtol=1e-6)
    assert metrics["tokens"] == batch.weights.sum()
    assert metrics["documents"] == 8
    np.testing.assert_allclose(metrics["padding_fraction"], 1 - batch.weights.mean(), rtol=1e-6)
    # The mean over means of sequences differs, because they have different numbers of targets.
    means = (ce * batch.weights).sum(1) / batch.weights.sum(1)
    assert abs(float(means.mean() - mean)) > 1e-3


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_over_unequal_micro_batches_equals_one_batch(tiny, start, batches, parts):
    batch = batches()
    cfg = dataclasses.replace(PLAIN, z_loss=0.1)
    expected_state, expected = stepper(tiny, cfg)(start, batch)
    state, metrics = stepper(tiny, dataclasses.replace(cfg, accumulation=parts))(start, batch)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-6, err_msg=name)
    for a, b in zip(*map(jax.tree.leaves, (state.params, expected_state.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_gradients_of_bfloat16_parameters_are_accumulated_in_float32():
    """256 + 1 is 256 in bfloat16."""

    def loss(params, batch, key, state):
        zero = jnp.float32(0)
        return jnp.sum(params * batch.inputs), (CrossEntropy(zero, zero, zero, zero), state)

    batch = Batch(*[jnp.array([256.0, 1.0, 1.0, 1.0], jnp.bfloat16)] * 5)
    grads, *_ = sum_gradients(loss, jnp.ones((), jnp.bfloat16), batch, None, num_parts=4)
    assert grads == 259


def test_a_batch_that_accumulation_does_not_divide_is_rejected(tiny, start, batches):
    cfg = dataclasses.replace(PLAIN, accumulation=3)
    with pytest.raises(ValueError, match="multiple of 3 sequences, got 8"):
        stepper(tiny, cfg)(start, batches())


def test_the_z_loss_is_logged_separately_and_changes_the_update(tiny, start, batches):
    batch = batches()
    plain, without = stepper(tiny)(start, batch)
    other, with_z = stepper(tiny, dataclasses.replace(PLAIN, z_loss=0.1))(start, batch)
    assert with_z["loss"] == without["loss"]
    assert without["z_loss"] == 0 and with_z["z_loss"] > 0
    assert with_z["grad_norm"] != without["grad_norm"]
    assert not np.array_equal(other.params["lm_head"]["kernel"], plain.params["lm_head"]["kernel"])


def test_norms_are_those_of_gradients_updates_and_parameters(tiny, start, batches):
    batch, state = batches(), start
    new, metrics = stepper(tiny)(state, batch)
    updates = jax.tree.map(jnp.subtract, new.params, state.params)
    np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(updates), rtol=1e-4)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(new.params), rtol=1e-6)
    # The optimizer clips to 0.1, but the norm is measured before clipping.
    assert metrics["grad_norm"] > 0.2


def with_nan(batch):
    weights = np.array(batch.weights)
    weights[0, 0] = np.nan
    return batch._replace(weights=weights)


def test_a_batch_with_nan_changes_only_the_step_and_the_guard(tiny, start, batches, assert_same):
    step = stepper(tiny)
    state, _ = step(start, batches())
    after, metrics = step(state, with_nan(batches()))
    assert metrics["skipped"] == 1 and metrics["update_norm"] == 0
    assert_same((after.params, after.opt_state), (state.params, state.opt_state))
    assert after.step == state.step + 1 and after.guard.skipped == 1
    assert after.guard.ema_grad_norm == state.guard.ema_grad_norm
    recovered, metrics = step(after, batches())
    assert metrics["skipped"] == 0 and recovered.guard.skipped == 0
    assert np.isfinite(metrics["loss"])


def test_a_batch_without_targets_is_skipped(tiny, start, batches, assert_same):
    state, batch = start, batches()
    after, metrics = stepper(tiny)(state, batch._replace(weights=np.zeros_like(batch.weights)))
    assert metrics["skipped"] == 1
    assert_same(after.params, state.params)


def test_a_gradient_norm_far_above_its_average_is_skipped(tiny, start, batches):
    cfg = dataclasses.replace(PLAIN, guard_floor=0.0, guard_factor=1.5)
    step, batch = stepper(tiny, cfg), batches()
    state, first = step(start, batch)
    assert first["skipped"] == 0  # no average yet
    large = jax.tree.map(lambda p: 30 * p, state.params)
    _, metrics = step(state.replace(params=large), batch)
    assert np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1
    floor = dataclasses.replace(cfg, guard_floor=float(metrics["grad_norm"]) + 1)
    _, metrics = stepper(tiny, floor)(state.replace(params=large), batch)
    assert metrics["skipped"] == 0


def test_a_spike_does_not_raise_its_own_bound():
    cfg = dataclasses.replace(PLAIN, guard_floor=0.0, guard_factor=2.0, max_consecutive_skips=99)
    check = jax.jit(functools.partial(guard.check_update, loss=jnp.float32(1), cfg=cfg))
    _, state = check(guard.Guard.start(), 0, grad_norm=jnp.float32(1))
    for step in range(1, 90):
        ok, state = check(state, step, grad_norm=jnp.float32(5))
        assert not ok and state.ema_grad_norm == 1


def test_after_too_many_consecutive_skips_all_updates_are_skipped(
    tiny, start, batches, assert_same
):
    cfg = dataclasses.replace(PLAIN, max_consecutive_skips=3)
    step, state = stepper(tiny, cfg), start
    for count in (1, 2, 3):
        state, metrics = step(state, with_nan(batches()))
        assert metrics["skipped_in_a_row"] == count
    after, metrics = step(state, batches())
    assert metrics["skipped_in_a_row"] == 4
    assert_same(after.params, state.params)


def test_vmapped_seeds_and_learning_rates_equal_separate_runs(tiny, tokens, batches):
    tx, keys = make_optimizer(PLAIN), jax.random.split(jax.random.key(3), 3)
    scales = jnp.array([0.5, 1.0, 2.0])
    train_step = make_train_step(tiny, tx, PLAIN)
    stack = jax.tree.map(lambda *x: np.stack(x), *[batches() for _ in range(4)])

    def initial_state(key, scale):
        return init_state(tiny, tx, key, tokens, lr_scale=scale)

    @jax.jit
    def train(keys, scales):
        states = jax.vmap(initial_state)(keys, scales)
        return jax.lax.scan(jax.vmap(train_step, in_axes=(0, None)), states, stack)

    states, metrics = train(keys, scales)
    assert metrics["loss"].shape == (4, 3)
    for i in range(3):
        alone = initial_state(keys[i], scales[i])
        for t in range(4):
            alone, expected = stepper(tiny)(alone, jax.tree.map(lambda x, t=t: x[t], stack))
            np.testing.assert_allclose(metrics["loss"][t, i], expected["loss"], rtol=1e-5)
            np.testing.assert_allclose(metrics["lr"][t, i], 0.1 * scales[i], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(states.params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5)


def test_any_optax_transformation_is_accepted(tiny, key, tokens, batches):
    tx = optax.sgd(0.5)
    state = init_state(tiny, tx, key, tokens)
    step, batch = jax.jit(make_train_step(tiny, tx, PLAIN)), batches()
    state, first = step(state, batch)
    _, second = step(state, batch)
    assert second["loss"] < first["loss"]
    assert "lr" not in first  # the rate of this optimizer, not of the config, is unknown


def small_lm(**fields):
    return LM(LMConfig(vocab_size=11, dim=16, pattern="ms", remat="none", **fields))


@pytest.mark.slow
def test_accumulation_with_the_language_model_equals_one_batch(key, tokens, batches):
    model, batch = small_lm(), batches(batch_size=4, length=9)
    state = init_state(model, make_optimizer(PLAIN), key, tokens)
    results = [
        stepper(model, dataclasses.replace(PLAIN, accumulation=parts))(state, batch)
        for parts in (1, 2, 4)
    ]
    for new, metrics in results[1:]:
        np.testing.assert_allclose(metrics["loss"], results[0][1]["loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], results[0][1]["grad_norm"], rtol=1e-5)
        # Adam's first step is the sign of the gradient: compare where it is not nearly zero.
        moments = [optax.tree.get(s.opt_state, "mu") for s in (new, results[0][0])]
        for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_gradients_of_packed_documents_equal_those_of_separate_ones(key, tokens, rng):
    model = small_lm()
    params = jax.jit(model.init)(key, tokens)["params"]
    lengths, total = (4, 7, 2), 16  # three documents, three positions of padding
    inputs = rng.integers(0, 11, (1, total)).astype(np.int32)
    targets = rng.integers(0, 11, (1, total)).astype(np.int32)
    segment = np.zeros((1, total), np.int32)
    separate = {name: np.zeros((3, total), np.int32) for name in ("inputs", "targets", "segment")}
    begin = 0
    for i, length in enumerate(lengths):
        segment[0, begin : begin + length] = i + 1
        separate["inputs"][i, :length] = inputs[0, begin : begin + length]
        separate["targets"][i, :length] = targets[0, begin : begin + length]
        separate["segment"][i, :length] = 1
        begin += length

    def grads(inputs, targets, segment):
        weights, index = (segment > 0).astype(np.float32), np.arange(len(segment))
        batch = Batch(inputs, targets, segment, weights, index)
        loss_fn = make_loss(model)
        return jax.jit(lambda p, b: sum_gradients(loss_fn, p, b, None)[:2])(params, batch)

    packed, packed_sums = grads(inputs, targets, segment)
    single, single_sums = grads(*separate.values())
    assert packed_sums.weight_sum == single_sums.weight_sum == sum(lengths)
    np.testing.assert_allclose(packed_sums.ce_sum, single_sums.ce_sum, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


def make_loss(model):
    from xlstm_jax.train.losses import stateful_loss

    return lambda params, batch, *rest: stateful_loss(model, params, batch, PLAIN, *rest)


def test_every_micro_batch_has_its_own_dropout_key():
    """Two equal micro-batches draw different random numbers."""
    draws = []

    def loss_fn(params, batch, key, state):
        jax.debug.callback(lambda x: draws.append(float(x)), jax.random.uniform(key))
        return params, (CrossEntropy(*jnp.ones(4)), state)

    ones = jnp.ones((4, 3), jnp.int32)
    batch = Batch(ones, ones, ones, jnp.ones((4, 3)), jnp.arange(4))
    sum_gradients(loss_fn, jnp.float32(1), batch, jax.random.key(0), 2)
    jax.effects_barrier()
    assert len(set(draws)) == 2


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step(key, tokens, batches):
    model = small_lm(dropout=0.5)
    step, batch = stepper(model), batches(batch_size=2, length=6)
    state = init_state(model, make_optimizer(PLAIN), key, tokens)
    losses = [
        float(step(state.replace(step=jnp.int32(number)), batch)[1]["loss"]) for number in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
