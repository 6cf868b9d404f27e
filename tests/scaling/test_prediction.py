"""Predictions: laws, surfaces, intervals, presets, and the commands they propose."""

import numpy as np
import pytest

from tests.scaling.test_fitting import NO_SURFACE, make_records
from tests.scaling.test_surface import FIXED
from xlstm_jax.cli.predict import PredictCommand, config_file, learning_rate, propose
from xlstm_jax.config import load_config
from xlstm_jax.errors import ArgumentError
from xlstm_jax.flops import train_flops
from xlstm_jax.modules import presets
from xlstm_jax.scaling import fit_power_law, fit_table, from_records, predict
from xlstm_jax.scaling.prediction import (
    _law_interval,
    architectures,
    find_group,
    flops_per_token_of,
)
from xlstm_jax.train.config import ExperimentConfig


@pytest.fixture(scope="module")
def fits():
    noise = np.random.default_rng(0)
    table = [
        *make_records(),
        *make_records(model="mlstm"),
        *make_records(model="mlstm", context_length=64, run_id=""),
    ]
    noisy = [
        record | {"val_loss": record["val_loss"] * noise.lognormal(0, 1e-3)} for record in table
    ]
    return fit_table(from_records(noisy), NO_SURFACE)


def test_laws_predict_the_optimum_within_their_interval(fits):
    fit = find_group(fits, family="llama")
    result = predict(fit, 1e20, seq_len=512, family="llama")
    size, tokens, loss = FIXED.optimum(1e20)
    np.testing.assert_allclose((result.num_params, result.tokens), (size, tokens), rtol=0.2)
    for interval, value in (
        (result.num_params_interval, size),
        (result.tokens_interval, tokens),
    ):
        assert interval is not None and interval.low < value < interval.high
    assert fit.laws is not None and len(fit.budgets) == 4
    assert result.num_params_interval is not None
    half = 2.920 * fit.laws.params.log_stderr(1e20)  # 95 % quantile of Student's t, 2 degrees
    expected = result.num_params * np.exp([-half, half])
    np.testing.assert_allclose(result.num_params_interval, expected, rtol=1e-6)
    np.testing.assert_allclose(result.loss, loss, rtol=0.05)
    np.testing.assert_allclose(result.extrapolation, 1e20 / 3e19)


@pytest.mark.parametrize("num_points, t", [(12, 1.812), (13, 1.796), (32, 1.697), (1002, 1.646)])
def test_intervals_of_many_points_use_the_quantiles_of_students_t(num_points, t, rng):
    flops = np.geomspace(1e18, 1e20, num_points)
    law = fit_power_law(flops**0.5 * np.exp(0.01 * rng.standard_normal(num_points)), flops)
    interval = _law_interval(1.0, law, 1e21)
    assert interval is not None
    # Beyond ten degrees of freedom the quantile is a series, whose error is below 1 %.
    np.testing.assert_allclose(np.log(interval.high), t * law.log_stderr(1e21), rtol=0.01)


def test_chosen_preset_is_the_nearest_and_uses_the_budget(fits):
    result = predict(find_group(fits, family="llama"), 1e20, seq_len=512, family="llama")
    choice = result.choice
    assert choice is not None
    flops = train_flops(presets.get(choice.preset), 512) / 512
    np.testing.assert_allclose(choice.tokens * flops, 1e20, rtol=1e-12)
    sizes = [x.num_params for x in architectures("llama", 512)]
    assert choice.num_params == min(sizes, key=lambda n: abs(np.log(n / result.num_params)))


def test_surface_predicts_at_the_exact_flops_of_the_family(fits):
    fit = find_group(fits, family="llama")._replace(laws=None, surface=FIXED)
    result = predict(fit, 1e20, seq_len=512, family="llama")
    exact = flops_per_token_of(architectures("llama", 512))
    np.testing.assert_allclose(exact(result.num_params) * result.tokens, 1e20, rtol=1e-9)
    np.testing.assert_allclose(result.loss, FIXED(result.num_params, result.tokens), rtol=1e-12)
    assert result.loss_interval is None and result.num_params_interval is None
    samples = np.array([FIXED[:3] + (alpha,) + FIXED[4:6] for alpha in np.linspace(0.34, 0.35, 30)])
    fit = fit._replace(surface=FIXED._replace(samples=samples))
    result = predict(fit, 1e20, seq_len=512, family="llama")
    interval = result.num_params_interval
    assert interval is not None and interval.low < result.num_params < interval.high
    resampled = FIXED._replace(samples=samples).resampled()
    optima = [surface.optimum(1e20, flops_per_token=exact) for surface in resampled]
    sizes = np.array([optimum.num_params for optimum in optima])
    # Of 30 samples, 5 % are below and above.
    assert (sizes < interval.low).sum() == (sizes > interval.high).sum() == 2


@pytest.mark.parametrize("family", ["xlstm", "llama"])
def test_smoothed_flops_are_within_a_few_percent_of_every_architecture(family):
    grid = architectures(family, 2048)
    smooth = flops_per_token_of(grid)(np.array([x.num_params for x in grid]))
    np.testing.assert_allclose(smooth, [x.flops_per_token for x in grid], rtol=0.06)


def test_unknown_family_has_no_preset(fits):
    result = predict(find_group(fits, family="llama"), 1e20, seq_len=512, family="mine")
    assert result.choice is None


def test_group_is_selected_by_family_and_context(fits):
    assert find_group(fits, family="xlstm", seq_len=64).group["model"] == "mlstm"
    for options in ({}, {"family": "xlstm"}, {"family": "rwkv"}, {"family": "llama", "seq_len": 9}):
        with pytest.raises(ArgumentError, match="model=llama context_length=512; model=mlstm"):
            find_group(fits, **options)


@pytest.mark.parametrize("flops", [0.0, -1.0, float("nan"), float("inf")])
def test_budget_must_be_positive(fits, flops):
    with pytest.raises(ArgumentError, match="flops must be positive and finite"):
        predict(fits.groups[0], flops, seq_len=512, family="llama")


def test_fit_without_laws_is_refused(fits):
    with pytest.raises(ArgumentError, match="neither power laws nor a loss surface"):
        predict(fits.groups[0]._replace(laws=None), 1e20, seq_len=512, family="llama")


def test_proposed_config_trains_the_budget(fits, tmp_path):
    result = predict(find_group(fits, family="llama"), 1e19, seq_len=512, family="llama")
    path = tmp_path / "optimal.py"
    args = PredictCommand(flops=1e19, out=path, batch_tokens=2**17)
    proposal = propose(result, "llama", 512, args)
    path.write_text(config_file(result, proposal))
    cfg = load_config(path, ExperimentConfig)
    assert cfg.data.batch_size * cfg.data.seq_len == 2**17
    sequences = cfg.data.batch_size * cfg.train.steps
    np.testing.assert_allclose(train_flops(cfg.model, 512) * sequences, 1e19, rtol=1e-3)
    assert cfg.train.lr == learning_rate("llama", cfg.model.dim) == 3e-3
    assert proposal.train == f"xlstm-jax train {path} --data.source DATA"
