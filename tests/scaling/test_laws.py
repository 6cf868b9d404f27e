"""Parabolas, power laws and fixed ratios: exact recovery, flags and errors."""

import numpy as np
import pytest

from xlstm_jax.errors import ArgumentError
from xlstm_jax.scaling import fit_fixed_ratio, fit_isoflop, fit_power_law, prediction_errors

A, B, C = 0.528241, -9.041477, 41.648069
SIZES = np.geomspace(1e8, 2e9, 9)


def parabola_losses(x):
    u = np.log10(x)
    return A * u**2 + B * u + C


def test_parabola_is_recovered():
    fit = fit_isoflop(SIZES, parabola_losses(SIZES))
    np.testing.assert_allclose((fit.a, fit.b, fit.c), (A, B, C), rtol=1e-8)
    np.testing.assert_allclose(fit.x_opt, 10 ** (-B / (2 * A)), rtol=1e-8)
    np.testing.assert_allclose(fit.loss_opt, C - B**2 / (4 * A), rtol=1e-8)
    np.testing.assert_allclose(fit(SIZES), parabola_losses(SIZES), rtol=1e-10)
    assert fit.is_valid and fit.problem == "" and fit.num_points == 9


def test_covariance_of_a_parabola_is_that_of_repeated_noise(rng):
    noise = 0.01 * rng.standard_normal((2000, len(SIZES)))
    fits = [fit_isoflop(SIZES, parabola_losses(SIZES) + sample) for sample in noise]
    estimates = np.array([(fit.a, fit.b, fit.c) for fit in fits])
    predicted = np.mean([np.diagonal(fit.covariance) for fit in fits], axis=0)
    np.testing.assert_allclose(estimates.var(axis=0), predicted, rtol=0.1)
    spread = np.std([np.log10(fit.x_opt) for fit in fits])
    np.testing.assert_allclose(np.mean([fit.log10_x_stderr for fit in fits]), spread, rtol=0.15)


def test_concave_parabola_is_flagged():
    fit = fit_isoflop(SIZES, 6 - parabola_losses(SIZES))
    assert not fit.is_valid and "concave" in fit.problem and np.isnan(fit.x_opt)


def test_minimum_outside_the_sizes_is_flagged():
    sizes = np.geomspace(1e9, 2e10, 6)
    fit = fit_isoflop(sizes, parabola_losses(sizes))
    assert not fit.is_valid and "outside" in fit.problem
    np.testing.assert_allclose(fit.x_opt, 10 ** (-B / (2 * A)), rtol=1e-6)


def test_power_law_is_recovered_and_inverted():
    flops = np.array([6e18, 1e19, 3e19, 1e20])
    law = fit_power_law(0.0022 * flops**0.575, flops)
    np.testing.assert_allclose((law.prefactor, law.exponent), (0.0022, 0.575), rtol=1e-10)
    np.testing.assert_allclose(law.inverse(law(flops)), flops, rtol=1e-10)
    np.testing.assert_allclose(law.exponent_stderr, 0, atol=1e-7)


def test_power_law_of_a_range_ignores_other_budgets():
    flops = np.array([1e17, 6e18, 1e19, 3e19, 6e20])
    x = 0.0022 * flops**0.575
    x[[0, -1]] *= 7
    law = fit_power_law(x, flops, flops_range=(5e18, 5e19))
    assert law.num_points == 3
    np.testing.assert_allclose((law.prefactor, law.exponent), (0.0022, 0.575), rtol=1e-10)


def test_standard_errors_are_those_of_repeated_noise(rng):
    flops = np.geomspace(1e18, 1e20, 6)
    noise = np.exp(0.05 * rng.standard_normal((2000, 6)))
    laws = [fit_power_law(0.0022 * flops**0.575 * sample, flops) for sample in noise]
    spread = np.std([law.exponent for law in laws])
    mean = np.sqrt(np.mean([law.exponent_stderr**2 for law in laws]))
    np.testing.assert_allclose(mean, spread, rtol=0.05)
    spread = np.std([np.log(law(1e22)) for law in laws])
    mean = np.sqrt(np.mean([law.log_stderr(1e22) ** 2 for law in laws]))
    np.testing.assert_allclose(mean, spread, rtol=0.05)


def test_line_of_a_fixed_ratio_is_recovered():
    flops = np.geomspace(1e18, 1e22, 5)
    line = fit_fixed_ratio(flops, np.exp(3.2 - 0.0476 * np.log(flops)))
    np.testing.assert_allclose((line.slope, line.intercept), (-0.0476, 3.2), rtol=1e-10)
    np.testing.assert_allclose(line(1e20), np.exp(3.2 - 0.0476 * np.log(1e20)), rtol=1e-10)


def test_two_points_have_no_standard_error():
    assert np.isnan(fit_fixed_ratio([1e18, 1e19], [3.0, 2.8]).slope_stderr)


@pytest.mark.parametrize(
    "call, part",
    [
        (lambda: fit_isoflop([1e8, 2e8], [3.0, 2.9]), "at least 3 points"),
        (lambda: fit_isoflop([1e8, 1e8, 2e8], [3.0, 3.1, 2.9]), "3 different values"),
        (lambda: fit_isoflop([1e8, 2e8, 3e8], [3.0, 0.0, 2.9]), "got 0.0 for point 1"),
        (lambda: fit_isoflop([1e8, 2e8, np.nan], [3.0, 3.0, 2.9]), "got 2 after dropping NaN"),
        (lambda: fit_power_law([1e8], [1e18]), "at least 2 points"),
        (lambda: fit_power_law([1e8, 2e8], [1e18, 1e18]), "two different values"),
        (lambda: fit_power_law([1.0, 2.0], [1.0, 2.0], flops_range=(5, 6)), "got 0 of 2"),
    ],
)
def test_unusable_points_are_refused(call, part):
    with pytest.raises(ArgumentError, match=part):
        call()


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("fit", [fit_isoflop, fit_power_law, fit_fixed_ratio, prediction_errors])
def test_shape_mismatch_raises(fit):
    """(n, 1) against (n,) would broadcast to (n, n)."""
    x = np.geomspace(1.0, 10.0, 5)
    for first, second in ((x[:, None], x), (x, x[:-1]), (x[:, None], x[:, None])):
        with pytest.raises(ArgumentError, match="vectors of one length"):
            fit(first, second)


def test_prediction_errors():
    errors = prediction_errors(np.array([3.1, 2.0, 1.0]), np.array([3.0, 2.0, 1.2]))
    np.testing.assert_allclose(errors.rms, np.sqrt((0.01 + 0.04) / 3))
    np.testing.assert_allclose((errors.largest, errors.mean), (0.2, -0.1 / 3))
    np.testing.assert_allclose(errors.r_squared, 1 - (0.01 + 0.04) / (4.88 / 3))
