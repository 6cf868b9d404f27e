"""Moving averages of the parameters, schedule-free runs, and `fit` with another loss."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlstm_jax.cli import main
from xlstm_jax.config import ConfigError
from xlstm_jax.data import load
from xlstm_jax.sharding import MeshConfig, make_devices
from xlstm_jax.train import (
    TrainConfig,
    averages,
    checkpoint,
    fit,
    init_state,
    make_optimizer,
    make_train_step,
    models,
    restore_params,
    rundir,
)
from xlstm_jax.train.averages import average_of
from xlstm_jax.train.losses import language_model_loss
from xlstm_jax.train.program import TrainProgram

EMA = TrainConfig(steps=20, warmup_steps=0, schedule="constant", lr=0.1, ema_decay=0.9)


def with_nan(batch):
    return batch._replace(weights=np.full_like(batch.weights, np.nan))


def test_the_moving_average_follows_accepted_updates(tiny, tokens, batches, assert_same):
    tx = make_optimizer(EMA)
    state = init_state(tiny, tx, jax.random.key(0), tokens, ema=True)
    assert_same(state.ema, state.params)
    step = jax.jit(make_train_step(tiny, tx, EMA))
    expected = state.ema
    for batch in (batches(), batches()):
        state, _ = step(state, batch)
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, state.params)
    for a, b in zip(*map(jax.tree.leaves, (state.ema, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    skipped, metrics = step(state, with_nan(batches()))
    assert metrics["skipped"] == 1
    assert_same(skipped.ema, state.ema)


def test_the_moving_average_is_at_least_float32():
    start = averages.start_ema({"a": jnp.ones(2, jnp.bfloat16)})
    average = averages.update_ema(start, {"a": jnp.full(2, 2, jnp.bfloat16)}, 0.999)
    assert average["a"].dtype == jnp.float32
    np.testing.assert_allclose(average["a"], 1.001, rtol=1e-6)


def test_a_state_without_an_average_is_rejected(tiny, tokens, batches):
    tx = make_optimizer(EMA)
    state = init_state(tiny, tx, jax.random.key(0), tokens)
    with pytest.raises(ValueError, match="train.ema_decay=0.9, got None; create .* ema=True"):
        jax.eval_shape(make_train_step(tiny, tx, EMA), state, batches())


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(ema_decay=0.9), dict(optimizer="schedule_free_adamw")])
def test_averages_of_vmapped_runs_equal_those_of_separate_runs(options, tiny, tokens, batches):
    cfg = dataclasses.replace(TrainConfig(steps=20, warmup_steps=0), **options)
    tx, keys, scales = make_optimizer(cfg), jax.random.split(jax.random.key(3), 2), (0.5, 2.0)
    step, batch = make_train_step(tiny, tx, cfg), jax.tree.map(jnp.asarray, batches())

    def train(key, scale):
        state = init_state(tiny, tx, key, tokens, lr_scale=scale, ema="ema_decay" in options)
        state = step(step(state, batch)[0], batch)[0]
        return average_of(state.params, state.opt_state) if state.ema is None else state.ema

    together = jax.jit(jax.vmap(train))(keys, jnp.array(scales))
    for index, scale in enumerate(scales):
        alone = jax.jit(train)(keys[index], scale)
        for a, b in zip(*map(jax.tree.leaves, (together, alone)), strict=True):
            np.testing.assert_allclose(a[index], b, rtol=1e-5, atol=1e-6)


def stop_at(step):
    def callback(current, record):
        if current == step:
            signal.raise_signal(signal.SIGTERM)

    return callback


@pytest.fixture(scope="module")
def ema_run(tiny_lm, experiment, tmp_path_factory):
    """A finished run with a moving average."""
    run_dir = tmp_path_factory.mktemp("ema") / "run"
    return run_dir, fit(experiment(ema_decay=0.9), run_dir)


def test_the_moving_average_is_saved_and_restored(ema_run, assert_same):
    run_dir, result = ema_run
    assert_same(restore_params(run_dir, ema=True)[1], result.state.ema)
    assert_same(restore_params(run_dir)[1], result.state.params)
    older = restore_params(run_dir, 10, ema=True)[1]
    assert not np.array_equal(jax.tree.leaves(older)[0], jax.tree.leaves(result.state.ema)[0])


def test_a_resumed_average_is_bit_exact(ema_run, experiment, tmp_path, assert_same):
    cfg = experiment(ema_decay=0.9)
    assert not fit(cfg, tmp_path / "run", on_metrics=stop_at(6)).finished
    assert_same(fit(cfg, tmp_path / "run").state, ema_run[1].state)


def test_an_average_cannot_be_added_to_a_run(ema_run, experiment, tmp_path):
    with pytest.raises(ConfigError, match="train.ema_decay: 0.5, stored 0.9"):
        fit(experiment(ema_decay=0.5), ema_run[0])
    fit(experiment(steps=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="must have been trained with train.ema_decay above 0"):
        restore_params(tmp_path / "run", ema=True)


@pytest.fixture(scope="module")
def schedule_free_run(tiny_lm, experiment, tmp_path_factory):
    """A finished schedule-free run, its config and the parameters to evaluate."""
    run_dir = tmp_path_factory.mktemp("schedule_free") / "run"
    cfg = experiment(optimizer="schedule_free_adamw", warmup_steps=2, schedule="constant", lr=0.1)
    result = fit(cfg, run_dir)
    return run_dir, cfg, result, average_of(result.state.params, result.state.opt_state)


def test_a_schedule_free_run_is_evaluated_and_restored_at_its_average(
    schedule_free_run, assert_same
):
    run_dir, cfg, result, average = schedule_free_run
    assert_same(restore_params(run_dir)[1], average)
    program = TrainProgram(cfg, make_devices(MeshConfig(data=1)))
    loss = {
        name: program.evaluate(params, load(cfg.data, "valid"))["valid_loss"]
        for name, params in (("average", average), ("params", result.state.params))
    }
    assert result.evaluation["valid_loss"] == pytest.approx(loss["average"], rel=1e-6)
    assert abs(loss["average"] - loss["params"]) > 1e-3


def test_a_resumed_schedule_free_run_is_bit_exact(schedule_free_run, tmp_path, assert_same):
    _, cfg, result, _ = schedule_free_run
    assert not fit(cfg, tmp_path / "run", on_metrics=stop_at(6)).finished
    assert_same(fit(cfg, tmp_path / "run").state, result.state)


def test_the_average_of_a_users_schedule_free_optimizer_is_restored(
    tiny_lm, experiment, tmp_path, assert_same
):
    tx = optax.chain(optax.clip(1.0), optax.contrib.schedule_free_sgd(0.1))
    state = fit(experiment(steps=3), tmp_path / "run", tx=tx).state
    assert_same(restore_params(tmp_path / "run")[1], average_of(state.params, state.opt_state))


@pytest.mark.slow
def test_a_run_that_starts_from_parameters_alone_may_be_averaged(
    schedule_free_run, tmp_path, assert_same
):
    _, cfg, _, params = schedule_free_run
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, ema_decay=0.5))
    values = rundir.to_dict(cfg)
    (tmp_path / "run").mkdir()
    rundir.write_json(tmp_path / "run" / rundir.CONFIG, values)
    checkpoint.save_params(tmp_path / "run", params, values)
    assert_same(restore_params(tmp_path / "run")[1], params)
    assert fit(cfg, tmp_path / "run").finished
    restore_params(tmp_path / "run", ema=True)


def test_fit_differentiates_another_loss_and_evaluates_the_language_model_loss(
    tiny_lm, experiment, tmp_path
):
    """Twice the loss has twice the gradients; the logged sums are those that it returns."""
    cfg = experiment(steps=3, log_every=1, eval_every=3)
    model = tiny_lm(cfg.model)

    def loss_fn(params, batch, key):
        total, sums = language_model_loss(model, params, batch, cfg.train, key)
        return 2 * total, sums._replace(correct_sum=-sums.weight_sum)

    results = [fit(cfg, tmp_path / str(i), loss_fn=f) for i, f in enumerate((None, loss_fn))]
    plain, other = (rundir.read_metrics(tmp_path / str(i) / rundir.METRICS) for i in (0, 1))
    assert other[0]["grad_norm"] == pytest.approx(2 * plain[0]["grad_norm"], rel=1e-5)
    assert other[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert other[0]["accuracy"] == -1 and plain[0]["accuracy"] >= 0
    assert results[1].evaluation["valid_accuracy"] >= 0


@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_commands_restore_the_moving_average_if_asked(name, monkeypatch, tmp_path, capsys):
    def load(source, step, *, ema, **options):
        raise ConfigError(f"restored with ema={ema}")

    monkeypatch.setattr(models, "load", load)
    options = [name, str(tmp_path), *(["--prompt", "a"] if name == "generate" else [])]
    for extra, expected in (([], False), (["--ema"], True)):
        assert main([*options, *extra]) == 2
        assert f"restored with ema={expected}" in capsys.readouterr().err
