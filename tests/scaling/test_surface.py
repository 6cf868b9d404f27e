"""Loss surfaces: recovery, optima, gradients, and the pitfalls of the objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.errors import ArgumentError
from xlstm_jax.scaling import LossSurface, fit_isoflop, fit_loss_surface, parabola_bias, surface_fit
from xlstm_jax.scaling.minimize import huber
from xlstm_jax.scaling.surface_fit import residuals_free

# Published in arXiv:2510.02228 (Transformer, gamma free) and arXiv:2404.10102 (gamma = 1).
FREE = LossSurface(11.9917, 13.3581, 0.01189, 0.52733, 0.50817, 0.29338)
FIXED = LossSurface(np.log(482.01), np.log(2085.43), np.log(1.8172), 0.3478, 0.3658, 1.0)
SIZES, TOKENS = (
    grid.ravel() for grid in np.meshgrid(np.geomspace(1e8, 7e9, 6), np.geomspace(2e9, 2e12, 6))
)


def fit_with_nan(noise=0.0, **options):
    """The fit of losses, one of which is missing."""
    append = [np.append(x, 1e9) for x in (SIZES, TOKENS)]
    factors = np.random.default_rng(0).lognormal(0, noise, len(SIZES))
    loss = np.append(factors * FREE(SIZES, TOKENS), np.nan)
    return fit_loss_surface(*append, loss, starts=40, **options)


def test_surface_is_recovered_and_missing_losses_are_counted():
    assert not jax.config.jax_enable_x64
    fit = fit_with_nan()
    assert fit.objective < 1e-14 and fit.num_starts == 40 and fit.num_at_best >= 10
    assert (fit.num_points, fit.num_dropped) == (36, 1)
    np.testing.assert_allclose(fit(SIZES, TOKENS), FREE(SIZES, TOKENS), rtol=1e-6)
    np.testing.assert_allclose(fit[:6], FREE[:6], rtol=1e-3, atol=1e-3)
    assert jnp.ones(()).dtype == jnp.float32


def test_some_starts_are_spread_over_the_grid():
    first, second = (
        surface_fit._starts(40, np.random.default_rng(seed), free_gamma=True) for seed in (0, 1)
    )
    assert not np.array_equal(first, second) and len(np.unique(first, axis=0)) == 40
    for column, values in zip(first.T, surface_fit.GRID.values(), strict=True):
        assert set(column) == set(values)


def test_mean_warns_and_has_the_same_optimum_at_a_scaled_tolerance():
    with pytest.warns(UserWarning, match="stop early"):
        fit_with_nan(0.01, reduction="mean")
    by_sum = fit_with_nan(0.01)
    by_mean = fit_with_nan(0.01, reduction="mean", tolerance=1e-12 / 36)
    np.testing.assert_allclose(by_mean.objective, by_sum.objective / 36, rtol=1e-9)
    np.testing.assert_allclose(by_mean[:6], by_sum[:6], rtol=1e-6)


@pytest.mark.slow
def test_surface_of_the_classical_form_is_recovered():
    loss = FIXED(SIZES, TOKENS)
    fit = fit_loss_surface(SIZES, TOKENS, loss, free_gamma=False, starts=100)
    assert fit.objective < 1e-14 and fit.gamma == 1 and fit.gradient_norm <= 1e-12
    np.testing.assert_allclose(fit[:6], FIXED[:6], rtol=1e-4)
    optimum, published = fit.optimum(5.76e23), FIXED.optimum(5.76e23)
    np.testing.assert_allclose(optimum, published, rtol=1e-6)


def test_closed_form_of_the_optimum_has_the_published_values():
    """The optima at 5.76e23 FLOPs of three published laws, which differ by rounding alone."""
    printed = LossSurface(np.log(406.4), np.log(410.7), np.log(1.69), 0.34, 0.28, 1.0)
    precise = printed._replace(alpha=0.3392, beta=0.2849)
    for law, size, ratio in (
        (FIXED, 7.225e10, 18.39),
        (printed, 3.219e10, 92.65),
        (precise, 4.031e10, 59.08),
    ):
        best = law.optimum(5.76e23)
        np.testing.assert_allclose(best.num_params, size, rtol=5e-4)
        np.testing.assert_allclose(best.tokens / best.num_params, ratio, rtol=5e-4)


@pytest.mark.parametrize("law", [FREE, FIXED], ids=["free", "fixed"])
@pytest.mark.parametrize("flops", [1e15, 3e19, 5.76e23])
def test_numeric_optimum_equals_the_closed_form(law, flops):
    numeric = law.optimum(flops, flops_per_token=lambda n: 6 * n)
    np.testing.assert_allclose(numeric, law.optimum(flops), rtol=1e-6)


def test_optimum_of_exact_flops_is_the_best_of_a_fine_grid():
    def flops_per_token(num_params):
        return 6 * num_params * (1 + 0.3 * np.sqrt(1e8 / num_params))

    sizes = np.geomspace(1e7, 1e12, 20001)
    best = FREE.best_of(1e21, sizes, flops_per_token(sizes))
    numeric = FREE.optimum(1e21, flops_per_token=flops_per_token)
    np.testing.assert_allclose(best.num_params, numeric.num_params, rtol=6e-4)
    assert numeric.loss <= best.loss
    np.testing.assert_allclose(flops_per_token(numeric.num_params) * numeric.tokens, 1e21)


def test_gamma_does_not_move_the_optimum():
    np.testing.assert_allclose(
        FREE.optimum(1e20)[:2], FREE._replace(gamma=1.0).optimum(1e20)[:2], rtol=1e-12
    )
    np.testing.assert_allclose(FIXED.size_exponent, 0.5126, atol=5e-5)


def test_parabola_is_biased_by_wide_grids_of_asymmetric_losses():
    def bias(law, factor):
        sizes = law.optimum(1e20).num_params * np.geomspace(1 / factor, factor, 15)
        return parabola_bias(law, sizes, 1e20 / (6 * sizes))

    symmetric = FIXED._replace(alpha=0.35, beta=0.35)
    asymmetric = FIXED._replace(alpha=0.6, beta=0.3)
    assert abs(bias(symmetric, 10)) < 1e-9
    assert abs(bias(asymmetric, 1.1)) < 1e-3 < 0.05 < abs(bias(asymmetric, 10))
    size = asymmetric.optimum(1e20).num_params
    sizes = size * np.geomspace(0.1, 10, 15)
    parabola = fit_isoflop(sizes, asymmetric(sizes, 1e20 / (6 * sizes)))
    assert bias(asymmetric, 10) == pytest.approx(np.log10(parabola.x_opt / size), rel=1e-6)


def test_surface_does_not_overflow():
    loss = FREE._replace(a=700.0, gamma=1.0)(1e8, 1e9)
    assert np.isfinite(np.log(loss))
    params = jnp.array([700.0, 13.0, 0.0, 0.5, 0.5, 1.5], jnp.float32)
    data = tuple(jnp.zeros(3, jnp.float32) for _ in range(3))
    values = jax.jit(residuals_free)(params, data)
    slopes = jax.jit(jax.jacfwd(residuals_free))(params, data)
    assert jnp.isfinite(values).all() and jnp.isfinite(slopes).all()


def test_gradient_of_the_objective_equals_finite_differences(x64):
    data = tuple(jnp.log(jnp.asarray(x)) for x in (SIZES, TOKENS, FREE(SIZES, TOKENS)))
    params = jnp.array([11.0, 13.6, 0.1, 0.5, 0.51, 0.3])

    @jax.jit
    def objective(params):
        return huber(residuals_free(params, data), 1e-3).sum()

    steps = 1e-6 * jnp.eye(6)
    differences = jnp.stack([(objective(params + s) - objective(params - s)) / 2e-6 for s in steps])
    np.testing.assert_allclose(jax.jit(jax.grad(objective))(params), differences, rtol=1e-6)


def test_huber_and_its_slope_are_continuous_at_delta(x64):
    delta, eps = 1e-3, 1e-12
    for sign in (1, -1):
        around = jnp.array([sign * (delta - eps), sign * (delta + eps)])
        values = huber(around, delta)
        np.testing.assert_allclose(values, delta**2 / 2, rtol=1e-8)
        slopes = jax.jit(jax.vmap(jax.grad(lambda r: huber(r, delta))))(around)
        np.testing.assert_allclose(slopes, sign * delta, rtol=1e-8)
    np.testing.assert_allclose(huber(jnp.array([3.0]), 1.0), [1 * (3 - 0.5)])
    np.testing.assert_allclose(huber(jnp.array([3.0]), jnp.inf), [4.5])


def noisy_fits(rng, repeats, **options):
    """Fits of losses with 1 % of log-normal noise."""
    for _ in range(repeats):
        loss = FIXED(SIZES, TOKENS) * np.exp(0.01 * rng.standard_normal(len(SIZES)))
        yield fit_loss_surface(SIZES, TOKENS, loss, free_gamma=False, starts=10, **options)


@pytest.mark.slow
def test_intervals_of_the_bootstrap_cover_the_truth(rng):
    covered = 0
    for fit in noisy_fits(rng, 100, bootstraps=30):
        ratios = [sample.size_exponent for sample in fit.resampled()]
        low, high = np.percentile(ratios, [5, 95])
        covered += low <= FIXED.size_exponent <= high
    assert covered >= 80


@pytest.mark.slow
def test_bootstrap_is_reproducible(rng):
    loss = FIXED(SIZES, TOKENS) * np.exp(0.01 * rng.standard_normal(len(SIZES)))
    options = dict(free_gamma=False, starts=10, bootstraps=40)
    first, same, other = (
        fit_loss_surface(SIZES, TOKENS, loss, seed=seed, **options) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first.samples, same.samples)
    assert not np.array_equal(first.samples, other.samples)
    assert len(np.unique(first.samples[:, 3])) == 40


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(loss=FREE(SIZES, TOKENS)[:, None]), "vectors of one length"),
        (dict(loss=np.append(FREE(SIZES[:6], TOKENS[:6]), [np.nan] * 30)), "got 6 after dropping"),
        (dict(delta=0.0), "delta must be positive"),
        (dict(bootstraps=-1), "bootstraps must be at least 0"),
        (dict(starts=0), "starts must be at least 1"),
        (dict(starts=np.zeros((3, 5))), r"the shape \(starts, 6\)"),
        (dict(reduction="max"), "reduction must be 'sum' or 'mean'"),
    ],
)
def test_unusable_arguments_are_refused(changes, part):
    columns = dict(num_params=SIZES, tokens=TOKENS, loss=FREE(SIZES, TOKENS))
    with pytest.raises(ArgumentError, match=part):
        fit_loss_surface(**columns | changes)


def test_surface_without_a_minimum_is_refused():
    with pytest.raises(ArgumentError, match="must be positive"):
        FREE._replace(beta=-0.1).optimum(1e20)
