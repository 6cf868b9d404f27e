"""The forecaster: its series, loss, baseline and inputs, criteria, and a short run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import forecaster as fc

CFG = dataclasses.replace(fc.config("smoke"), num_layers=1)
START = fc.PATCH * CFG.context


@pytest.fixture(scope="module")
def model():
    """A model with random parameters, its variables, and a function of values and visible."""
    model = fc.Forecaster("sLSTM", CFG.width, CFG.num_layers)
    series = fc.draw_series(1, 3, CFG.length)
    variables = jax.jit(model.init)(jax.random.key(0), *series)
    return (
        model,
        variables,
        jax.jit(lambda values, visible: model.apply(variables, values, visible)),
    )


def test_series_have_gaps_and_depend_on_their_seed_alone():
    series = fc.draw_series(3, 50, CFG.length)
    assert series.values.dtype == np.float32 and series.values.shape == (50, CFG.length)
    assert 0.05 < 1 - series.observed.mean() < 0.5
    np.testing.assert_array_equal(series.values[~series.observed], 0)
    np.testing.assert_array_equal(series.values, fc.draw_series(3, 50, CFG.length).values)
    assert (series.values != fc.draw_series(4, 50, CFG.length).values).any()


def test_training_hides_the_horizon_and_stretches_before_it():
    series = fc.draw_series(3, 200, CFG.length)
    visible = fc.hide(series, CFG, seed=0)
    assert not (visible & ~series.observed).any() and not visible[:, START:].any()
    assert visible[:, 0].all()  # scale and mean are of something
    hidden = (series.observed & ~visible)[:, :START].reshape(200, -1, fc.PATCH).any(axis=2)
    assert set(hidden.sum(axis=1).tolist()) == set(range(CFG.horizon + 1))


def test_the_loss_is_least_at_the_quantiles_and_is_an_error_in_units_of_scale(rng):
    values = rng.standard_normal((1, 4000)).astype(np.float32)
    best = np.quantile(values, fc.QUANTILES).astype(np.float32)
    ones = jnp.ones_like(values)

    def loss(quantiles, scale=1.0):
        forecast = jnp.broadcast_to(quantiles[None, None], (*values.shape, len(fc.QUANTILES)))
        return fc.pinball(forecast, values, ones, jnp.full((1, 1), scale))

    for shift in (0.1, -0.1):
        for index in range(len(fc.QUANTILES)):
            other = best.copy()
            other[index] += shift
            assert loss(jnp.asarray(other)) > loss(jnp.asarray(best))
    zeros = jnp.zeros(len(fc.QUANTILES))
    assert loss(zeros) == pytest.approx(abs(values).mean(), rel=1e-2)  # symmetric values
    assert loss(zeros, 2.0) == pytest.approx(loss(zeros) / 2)


def test_unobserved_values_have_no_weight_in_the_loss():
    values, weights = jnp.array([[1.0, 5.0]]), jnp.array([[1.0, 0.0]])
    forecast = jnp.zeros((1, 2, len(fc.QUANTILES)))
    assert fc.pinball(forecast, values, weights, jnp.ones((1, 1))) == pytest.approx(1.0)


def test_hidden_values_change_no_forecast(model):
    *_, apply = model
    series = fc.draw_series(5, 3, CFG.length)
    visible = series.observed & (np.arange(CFG.length)[None] < START)
    other = np.where(visible, series.values, np.float32(1e6))
    np.testing.assert_array_equal(apply(series.values, visible), apply(other, visible))


def test_forecasts_are_causal_given_the_scale(model, monkeypatch):
    _, variables, _ = model
    one = jnp.ones((3, 1))
    monkeypatch.setattr(fc, "moments", lambda values, visible: (0 * one, one))
    apply = jax.jit(model[0].apply)
    series = fc.draw_series(5, 3, CFG.length)
    later = series.values.copy()
    later[:, 3 * fc.PATCH :] += 1
    a, b = (np.asarray(apply(variables, v, series.observed)) for v in (series.values, later))
    np.testing.assert_array_equal(a[:, : 3 * fc.PATCH], b[:, : 3 * fc.PATCH])
    assert (a != b).any()


def test_forecasts_scale_with_the_series(model):
    forecaster, variables, _ = model
    series = fc.draw_series(6, 3, CFG.length)
    scaled = series._replace(values=8 * series.values)
    quantiles = fc.forecast(forecaster, variables, series, CFG)
    assert quantiles.shape == (3, fc.PATCH * CFG.horizon, len(fc.QUANTILES))
    assert (np.diff(quantiles, axis=-1) >= 0).all()
    other = fc.forecast(forecaster, variables, scaled, CFG)
    np.testing.assert_allclose(other, 8 * quantiles, rtol=1e-3, atol=1e-3 * abs(other).max())


def test_training_improves_the_forecast():
    model, trained = fc.train(CFG, "LSTM")
    series = fc.draw_series(0, 64, CFG.length)
    first = jax.jit(model.init)(jax.random.key(0), *fc.draw_series(1, 8, CFG.length))
    losses = [
        fc.measure(fc.forecast(model, variables, series, CFG), series, CFG)["pinball"]
        for variables in (trained, first)
    ]
    assert losses[0] < losses[1]


def test_the_baseline_repeats_the_last_observed_value_of_each_phase():
    t = np.arange(CFG.length) - START
    values = (t % fc.PERIOD + 100 * (t // fc.PERIOD)).astype(np.float32)[None]
    observed = np.ones(values.shape, bool)
    observed[:, START - fc.PERIOD : START - 4] = False  # most of the last season
    observed[:, START:] = False
    series = fc.Series(np.where(observed, values, 0), observed)
    quantiles = fc.seasonal_naive(series, CFG)
    # Every season is 100 above the one before; of most phases the last one is missing.
    expected = np.arange(fc.PERIOD) - 100 * (np.arange(fc.PERIOD) < fc.PERIOD - 4)
    np.testing.assert_allclose(quantiles, np.repeat(expected[None, :, None], 9, axis=-1))


def test_coverage_is_the_share_of_observed_values_within_the_outer_quantiles():
    series = fc.draw_series(7, 2, CFG.length)
    target = series.values[:, START:]
    width = np.where(np.arange(target.shape[1]) % 4 == 0, -1, 1)[None, :, None]
    quantiles = target[..., None] + width * np.linspace(-1, 1, 9)[None, None]
    observed = series.observed[:, START:]
    share = observed[:, np.arange(target.shape[1]) % 4 != 0].sum() / observed.sum()
    measured = fc.measure(quantiles.astype(np.float32), series, CFG)
    assert measured["coverage"] == pytest.approx(share, abs=1e-4)


def test_xlstm_must_be_ahead_of_the_baseline_with_calibrated_intervals():
    def models(naive, slstm, mlstm, coverage=0.8):
        losses = {fc.NAIVE: naive, "LSTM": 9.0, "sLSTM": slstm, "mLSTM": mlstm}
        return {n: {"pinball": loss, "coverage": coverage} for n, loss in losses.items()}

    assert list(fc.outcome(models(1.0, 0.8, 0.9)).values()) == [True, True, True]
    assert list(fc.outcome(models(1.0, 0.81, 1.0, 0.9)).values()) == [False, False, False]


@pytest.mark.slow
def test_the_smallest_size_writes_a_result(tmp_path, one_device, monkeypatch):
    monkeypatch.setattr(fc.cpu, "prepare", lambda: True)
    assert fc.main(fc.Options(size="smoke", out=tmp_path / "r.json")) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["models"]) == {fc.NAIVE, *fc.CELLS}
    assert 0 < (tmp_path / "r.png").stat().st_size < 300 * 1024
