"""One update: the token mean however it is summed, and a guard that keeps harm out."""

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
from xlstm_jax.train import TrainConfig, init_state, make_optimizer, make_train_step
from xlstm_jax.train.step import sum_gradients

PLAIN = TrainConfig(steps=20, warmup_steps=0, schedule="constant", lr=0.1, grad_clip=0.1)


@pytest.fixture
def start(tiny, tokens):
    """The first state, whatever the config."""
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
    # A mean of the means of rows is another number: rows have unequal weight here.
    rows = (ce * batch.weights).sum(1) / batch.weights.sum(1)
    assert abs(float(rows.mean() - mean)) > 1e-3


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_of_unequal_weight_equal_one_batch(tiny, start, batches, parts):
    batch = batches()
    cfg = dataclasses.replace(PLAIN, z_loss=0.1)
    whole, expected = stepper(tiny, cfg)(start, batch)
    split, found = stepper(tiny, dataclasses.replace(cfg, accumulation=parts))(start, batch)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(split.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_rows_that_do_not_divide_are_refused(tiny, start, batches):
    cfg = dataclasses.replace(PLAIN, accumulation=3)
    with pytest.raises(ValueError, match="multiple of 3 sequences, got 8"):
        stepper(tiny, cfg)(start, batches())


def test_the_z_loss_is_logged_apart_and_moves_parameters(tiny, start, batches):
    batch = batches()
    plain, without = stepper(tiny)(start, batch)
    other, with_z = stepper(tiny, dataclasses.replace(PLAIN, z_loss=0.1))(start, batch)
    assert with_z["loss"] == without["loss"]
    assert without["z_loss"] == 0 and with_z["z_loss"] > 0
    assert with_z["grad_norm"] != without["grad_norm"]
    assert not np.array_equal(other.params["lm_head"]["kernel"], plain.params["lm_head"]["kernel"])


def test_norms_are_those_of_gradient_update_and_parameters(tiny, start, batches):
    batch, state = batches(), start
    new, metrics = stepper(tiny)(state, batch)
    moved = jax.tree.map(jnp.subtract, new.params, state.params)
    np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(moved), rtol=1e-4)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(new.params), rtol=1e-6)
    # The optimiser clips to 0.1; the gradient is reported as it was.
    assert metrics["grad_norm"] > 0.2


def poison(batch):
    weights = np.array(batch.weights)
    weights[0, 0] = np.nan
    return batch._replace(weights=weights)


def test_a_batch_with_nan_changes_nothing_but_the_count(tiny, start, batches, assert_same):
    step = stepper(tiny)
    state, _ = step(start, batches())
    after, metrics = step(state, poison(batches()))
    assert metrics["skipped"] == 1 and metrics["update_norm"] == 0
    assert_same((after.params, after.opt_state), (state.params, state.opt_state))
    assert after.step == state.step + 1 and after.guard.skipped == 1
    assert after.guard.ema_grad_norm == state.guard.ema_grad_norm
    healed, metrics = step(after, batches())
    assert metrics["skipped"] == 0 and healed.guard.skipped == 0
    assert np.isfinite(metrics["loss"])


def test_a_batch_without_any_target_is_skipped(tiny, start, batches, assert_same):
    state, batch = start, batches()
    after, metrics = stepper(tiny)(state, batch._replace(weights=np.zeros_like(batch.weights)))
    assert metrics["skipped"] == 1
    assert_same(after.params, state.params)


def test_an_exploding_gradient_is_discarded_by_the_ema_grad_norm(tiny, start, batches):
    cfg = dataclasses.replace(PLAIN, guard_floor=0.0, guard_factor=1.5)
    step, batch = stepper(tiny, cfg), batches()
    state, first = step(start, batch)
    assert first["skipped"] == 0  # nothing is usual yet
    large = jax.tree.map(lambda p: 30 * p, state.params)
    _, metrics = step(state.replace(params=large), batch)
    assert np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1
    floor = dataclasses.replace(cfg, guard_floor=float(metrics["grad_norm"]) + 1)
    _, metrics = stepper(tiny, floor)(state.replace(params=large), batch)
    assert metrics["skipped"] == 0


def test_after_too_many_in_a_row_nothing_is_taken_any_more(tiny, start, batches, assert_same):
    cfg = dataclasses.replace(PLAIN, max_consecutive_skips=3)
    step, state = stepper(tiny, cfg), start
    for count in (1, 2, 3):
        state, metrics = step(state, poison(batches()))
        assert metrics["skipped_in_a_row"] == count
    after, metrics = step(state, batches())
    assert metrics["skipped_in_a_row"] == 4
    assert_same(after.params, state.params)


def test_seeds_and_rates_train_together_as_they_do_alone(tiny, tokens, batches):
    tx, keys = make_optimizer(PLAIN), jax.random.split(jax.random.key(3), 3)
    scales = jnp.array([0.5, 1.0, 2.0])
    train_step = make_train_step(tiny, tx, PLAIN)
    stack = jax.tree.map(lambda *x: np.stack(x), *[batches() for _ in range(4)])

    def begin(key, scale):
        return init_state(tiny, tx, key, tokens, lr_scale=scale)

    @jax.jit
    def train(keys, scales):
        states = jax.vmap(begin)(keys, scales)
        return jax.lax.scan(jax.vmap(train_step, in_axes=(0, None)), states, stack)

    states, metrics = train(keys, scales)
    assert metrics["loss"].shape == (4, 3)
    for i in range(3):
        alone = begin(keys[i], scales[i])
        for t in range(4):
            alone, found = stepper(tiny)(alone, jax.tree.map(lambda x, t=t: x[t], stack))
            np.testing.assert_allclose(metrics["loss"][t, i], found["loss"], rtol=1e-5)
            np.testing.assert_allclose(metrics["lr"][t, i], 0.1 * scales[i], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(states.params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5)


def test_any_transformation_of_optax_will_do(tiny, key, tokens, batches):
    tx = optax.sgd(0.5)
    state = init_state(tiny, tx, key, tokens)
    step, batch = jax.jit(make_train_step(tiny, tx, PLAIN)), batches()
    state, first = step(state, batch)
    _, second = step(state, batch)
    assert second["loss"] < first["loss"]


def small_lm(**fields):
    return LM(LMConfig(vocab_size=11, dim=16, pattern="ms", remat="none", **fields))


@pytest.mark.slow
def test_the_language_model_adds_micro_batches_up_to_one_batch(key, tokens, batches):
    model, batch = small_lm(), batches(num_rows=4, length=9)
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
def test_a_packed_row_learns_what_its_documents_teach_apart(key, tokens, rng):
    model = small_lm()
    params = jax.jit(model.init)(key, tokens)["params"]
    lengths, total = (4, 7, 2), 16  # three documents, three positions of padding
    inputs = rng.integers(0, 11, (1, total)).astype(np.int32)
    targets = rng.integers(0, 11, (1, total)).astype(np.int32)
    segment = np.zeros((1, total), np.int32)
    apart = {name: np.zeros((3, total), np.int32) for name in ("inputs", "targets", "segment")}
    begin = 0
    for i, length in enumerate(lengths):
        segment[0, begin : begin + length] = i + 1
        apart["inputs"][i, :length] = inputs[0, begin : begin + length]
        apart["targets"][i, :length] = targets[0, begin : begin + length]
        apart["segment"][i, :length] = 1
        begin += length

    def grads(inputs, targets, segment):
        weights, index = (segment > 0).astype(np.float32), np.arange(len(segment))
        batch = Batch(inputs, targets, segment, weights, index)
        loss_fn = make_loss(model)
        return jax.jit(lambda p, b: sum_gradients(loss_fn, p, b, None))(params, batch)

    packed, packed_sums = grads(inputs, targets, segment)
    single, single_sums = grads(*apart.values())
    assert packed_sums.weight_sum == single_sums.weight_sum == sum(lengths)
    np.testing.assert_allclose(packed_sums.ce_sum, single_sums.ce_sum, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


def make_loss(model):
    from xlstm_jax.train.losses import language_model_loss

    return lambda params, batch, key: language_model_loss(model, params, batch, PLAIN, key)


def test_every_micro_batch_drops_by_a_key_of_its_own():
    """Two equal halves: with one key for both, their losses would be equal as well."""
    drawn = []

    def loss_fn(params, batch, key):
        jax.debug.callback(lambda x: drawn.append(float(x)), jax.random.uniform(key))
        return params, CrossEntropy(*jnp.ones(4))

    ones = jnp.ones((4, 3), jnp.int32)
    batch = Batch(ones, ones, ones, jnp.ones((4, 3)), jnp.arange(4))
    sum_gradients(loss_fn, jnp.float32(1), batch, jax.random.key(0), 2)
    jax.effects_barrier()
    assert len(set(drawn)) == 2


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step(key, tokens, batches):
    model = small_lm(dropout=0.5)
    step, batch = stepper(model), batches(num_rows=2, length=6)
    state = init_state(model, make_optimizer(PLAIN), key, tokens)
    losses = [
        float(step(state.replace(step=jnp.int32(number)), batch)[1]["loss"]) for number in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
