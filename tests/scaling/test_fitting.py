"""Fits of tables: what is fitted, flagged and used as a holdout, and the file of the result."""

import dataclasses

import numpy as np
import pytest

from tests.scaling.test_surface import FIXED
from xlstm_jax.errors import ArgumentError, ConfigError
from xlstm_jax.scaling import Analysis, Condition, fit_table, fitting, from_records, holdout, store
from xlstm_jax.scaling.fitting import fit_budgets, fit_group, fit_laws

BUDGETS = (1e18, 3e18, 1e19, 3e19)


def make_records(budgets=BUDGETS, **columns):
    """Runs of FIXED's losses: eight sizes around the optimum of each budget."""
    return [
        {
            "run_id": f"{columns.get('model', 'llama')} {flops:.0e} {n}",
            "model": "llama",
            "context_length": 512,
            "num_params": size,
            "train_tokens": flops / (6 * size),
            "train_flops": flops,
            "val_loss": float(FIXED(size, flops / (6 * size))),
        }
        | columns
        for flops in budgets
        for n, size in enumerate(FIXED.optimum(flops).num_params * np.geomspace(0.5, 2, 8))
    ]


NO_SURFACE = Analysis(surface=(Condition(column="model", values=("none",)),))


def test_budgets_and_laws_of_a_group():
    fit = fit_group({}, from_records(make_records()), NO_SURFACE)
    assert [b.num_runs for b in fit.budgets] == [8] * 4
    assert fit.surface is None and fit.flags == ()
    assert fit.laws is not None and fit.laws.labels == tuple(b.label for b in fit.budgets)
    np.testing.assert_allclose(fit.laws.params.exponent, FIXED.size_exponent, rtol=1e-3)
    for budget in fit.budgets:
        size, tokens, loss = FIXED.optimum(budget.flops)
        np.testing.assert_allclose(budget.params.x_opt, size, rtol=0.01)
        np.testing.assert_allclose(budget.tokens.x_opt, tokens, rtol=0.01)
        np.testing.assert_allclose(budget.params.loss_opt, loss, rtol=1e-4)


def test_invalid_parabolas_are_flagged_and_left_out_of_the_laws():
    table = from_records(make_records())
    losses = table["val_loss"].copy()
    losses[:8] = 9 - losses[:8]
    table = dataclasses.replace(table, columns={**table.columns, "val_loss": losses})
    flags = []
    budgets = fit_budgets(table, Analysis(), flags)
    assert (
        len(flags) == 2 and "budget 1e+18: parabola in parameters is not used, concave" in flags[0]
    )
    laws = fit_laws(budgets, Analysis(), flags)
    assert laws is not None and len(laws.labels) == 3


def test_budgets_with_two_sizes_are_flagged():
    flags = []
    budgets = fit_budgets(from_records(make_records()[:-6]), Analysis(budgets=BUDGETS), flags)
    assert len(budgets) == 3
    assert "budget 3e+19: x, loss must have at least 3 points" in flags[0]


def test_range_of_the_laws_uses_the_mean_flops():
    table = from_records(make_records())
    cfg = Analysis(flops_range=(2e18, 2e19))
    laws = fit_laws(fit_budgets(table, cfg, []), cfg, [])
    assert laws is not None and laws.params.num_points == 2


def test_holdout_with_too_few_budgets_is_refused_with_their_names():
    with pytest.raises(ArgumentError, match=r"3 valid budgets .* got 2 \(1e\+18, 3e\+18\)"):
        holdout(from_records(make_records(BUDGETS[:3])), Analysis(budgets=BUDGETS))


def test_holdout_budget_is_predicted():
    largest = holdout(from_records(make_records()), NO_SURFACE)
    assert largest.run_errors is None and largest.label == pytest.approx(3e19)
    measured = fit_budgets(from_records(make_records()), NO_SURFACE, [])[-1]
    assert largest.num_params_measured == measured.params.x_opt
    assert largest.tokens_measured == measured.tokens.x_opt
    assert largest.loss_measured == measured.params.loss_opt
    np.testing.assert_allclose(largest.num_params, largest.num_params_measured, rtol=0.01)
    np.testing.assert_allclose(largest.tokens, largest.tokens_measured, rtol=0.01)
    np.testing.assert_allclose(largest.loss, largest.loss_measured, rtol=0.02)
    # The prediction does not change with the losses of the holdout, the measured value does.
    changed = [record | {"val_loss": 1 + record["val_loss"]} for record in make_records()[-8:]]
    other = holdout(from_records([*make_records()[:-8], *changed]), NO_SURFACE)
    np.testing.assert_allclose((other.num_params, other.loss), (largest.num_params, largest.loss))
    np.testing.assert_allclose(other.loss_measured, largest.loss_measured + 1)


def test_surface_gets_the_settings_and_few_starts_at_the_best_objective_are_flagged(monkeypatch):
    calls = []

    def fit_loss_surface(*columns, **options):
        calls.append(options)
        return FIXED._replace(num_at_best=len(calls) + 1, num_starts=7)

    monkeypatch.setattr(fitting, "fit_loss_surface", fit_loss_surface)
    cfg = Analysis(free_gamma=False, delta=0.01, starts=7, bootstraps=5, seed=3)
    flags = []
    surface, errors = fitting.fit_surface(from_records(make_records()), cfg, flags)
    assert surface is not None and errors is not None and errors.rms < 1e-12
    assert calls == [dict(free_gamma=False, delta=0.01, starts=7, bootstraps=5, seed=3)]
    assert len(flags) == 1 and "only 2 of 7 starts reached the best objective" in flags[0]
    fitting.fit_surface(from_records(make_records()), cfg, flags, bootstraps=0)
    assert calls[1]["bootstraps"] == 0 and len(flags) == 1


def test_conventions_are_checked_before_any_fit():
    mixed = [record | {"tokenizer": str(n % 2)} for n, record in enumerate(make_records())]
    with pytest.raises(ConfigError, match="runs of llama 512 must agree in tokenizer"):
        fit_table(from_records(mixed))


def test_saved_fits_are_read_in_full_precision(tmp_path):
    table = from_records([*make_records(), *make_records(model="xlstm")])
    fits = fit_table(table, NO_SURFACE)
    assert [fit.group["model"] for fit in fits.groups] == ["llama", "xlstm"]
    assert fits.versions.keys() >= {"xlstm-jax", "jax"} and fits.num_rows == 64
    store.save(fits, tmp_path / "fit.json")
    with np.printoptions(floatmode="unique"):  # otherwise arrays are printed with eight digits
        assert str(store.load(tmp_path / "fit.json")) == str(fits)
    with pytest.raises(ConfigError, match="does not exist; write it with `xlstm-jax fit"):
        store.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_text('{"groups": 3}')
    with pytest.raises(ConfigError, match="is not a fit"):
        store.load(tmp_path / "other.json")


@pytest.mark.slow
def test_surface_of_a_table_and_its_holdout_prediction():
    cfg = Analysis(free_gamma=False, starts=60, bootstraps=30)
    fit = fit_table(from_records(make_records()), cfg).groups[0]
    assert fit.surface is not None and fit.holdout is not None and fit.surface_errors is not None
    assert fit.surface_errors.rms < 1e-6 and fit.surface.samples.shape == (30, 6)
    assert fit.holdout.run_errors is not None and fit.holdout.run_errors.rms < 1e-5
    assert all(b.bias is not None and abs(b.bias) < 0.01 for b in fit.budgets)
