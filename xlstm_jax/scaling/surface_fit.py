"""Fits of the loss surface: Huber losses of log losses, minimized from a grid of starts.

Sources: arXiv:2203.15556 (objective and starts), arXiv:2404.10102 (why losses are summed, not
averaged, and why coefficients are not rounded), arXiv:2510.02228 (free gamma).
"""

import itertools
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.scaling.checks import Column, points
from xlstm_jax.scaling.minimize import Minimum, minimize
from xlstm_jax.scaling.surface import COEFFICIENTS, LossSurface
from xlstm_jax.typing import Array, Float

GRID = {
    "a": (0.0, 5.0, 10.0, 15.0, 20.0),
    "b": (0.0, 5.0, 10.0, 15.0, 20.0),
    "e": (-1.0, -0.5, 0.0, 0.5, 1.0),
    "alpha": (0.0, 0.2, 0.5, 1.0),
    "beta": (0.0, 0.2, 0.5, 1.0),
    "gamma": (0.0, 0.5, 1.0, 1.5),
}
"""Starting values of each coefficient, those of arXiv:2510.02228."""

TOLERANCE = 1e-12
"""Largest component of the gradient of the objective at which a start has converged."""

AT_BEST = 1e-3
"""Relative difference to the lowest objective below which a start has reached it."""

WARM_STARTS = 4
"""Starts of each bootstrap: the best coefficients, and those where other starts ended."""

Starts = int | Float[np.ndarray, "starts 6"] | None


def fit_loss_surface(
    num_params: Column,
    tokens: Column,
    loss: Column,
    *,
    free_gamma: bool = True,
    delta: float = 1e-3,
    starts: Starts = None,
    bootstraps: int = 0,
    seed: int = 0,
    reduction: Literal["sum", "mean"] = "sum",
    tolerance: float = TOLERANCE,
) -> LossSurface:
    """Fits L(N, D) = E + (A N^-alpha + B D^-beta)^gamma to the losses of runs.

    All starts are one program in float64 on a CPU; the settings of JAX are not changed.

    Args:
        loss: nats per token; points with NaN are dropped and counted.
        free_gamma: False fixes gamma at 1.
        delta: threshold of the Huber loss, in ln loss.
        starts: None: every combination of `GRID`, 8,000 or, with gamma fixed, 2,000; an integer:
            so many of these, drawn by `seed`; or an array with the columns `COEFFICIENTS`.
        bootstraps: number of fits to points that are drawn with replacement, from `WARM_STARTS`
            starts each; their coefficients are the `samples` of the result.
        reduction: "mean" divides the objective by the number of points, for comparison.
        tolerance: see `TOLERANCE`.

    Raises:
        ArgumentError: an argument is out of range, or there are too few points.
    """
    _check(delta=delta, bootstraps=bootstraps, tolerance=tolerance, reduction=reduction)
    count = len(COEFFICIENTS) if free_gamma else len(COEFFICIENTS) - 1
    columns, num_dropped = points(count + 1, num_params=num_params, tokens=tokens, loss=loss)
    rng = np.random.default_rng(seed)
    *sizes, log_loss = map(np.log, columns)
    centers = [float(size.mean()) for size in sizes]
    data = (*(size - center for size, center in zip(sizes, centers, strict=True)), log_loss)
    num_points = len(log_loss)
    weights = np.full(num_points, 1.0 if reduction == "sum" else 1 / num_points)
    options: dict[str, Any] = dict(delta=delta, tolerance=tolerance)
    residuals = residuals_free if free_gamma else residuals_fixed
    first = _to_centered(_starts(starts, rng, free_gamma=free_gamma), centers)[:, :count]
    minimum = minimize(residuals, first, data, weights, **options)
    best = int(np.argmin(minimum.objective))
    samples = np.zeros((0, len(COEFFICIENTS)))
    if bootstraps:
        drawn = rng.multinomial(num_points, np.full(num_points, 1 / num_points), size=bootstraps)
        samples = _bootstrap(residuals, minimum, data, drawn * weights, options)
        samples = _from_centered(samples, centers)
    coefficients = _from_centered(minimum.params[best : best + 1], centers)[0]
    # Noise-free losses end at objectives of rounding errors, which differ by any factor.
    rounding = num_points * (1e-8) ** 2 / 2
    return LossSurface(
        *coefficients.tolist(),
        objective=float(minimum.objective[best]),
        gradient_norm=float(minimum.gradient_norm[best]),
        num_starts=len(first),
        num_at_best=int(
            np.sum(minimum.objective <= (1 + AT_BEST) * minimum.objective[best] + rounding)
        ),
        num_points=num_points,
        num_dropped=num_dropped,
        delta=delta,
        samples=samples,
    )


def _check(*, delta: float, bootstraps: int, tolerance: float, reduction: str) -> None:
    for name, value in (("delta", delta), ("tolerance", tolerance)):
        if not value > 0:
            raise ArgumentError(
                f"{name} must be positive, got {quote(value)}; 1e-3 and 1e-12 are usual."
            )
    if bootstraps < 0:
        raise ArgumentError(f"bootstraps must be at least 0, got {bootstraps}; 500 are usual.")
    if reduction not in ("sum", "mean"):
        raise ArgumentError(
            f"reduction must be 'sum' or 'mean', got {quote(reduction)}; use 'sum'."
        )
    if reduction == "mean" and delta <= 1e-3 and tolerance >= TOLERANCE:
        warnings.warn(
            f"reduction='mean' with delta={delta} makes the objective so small that starts stop "
            f"early at tolerance={tolerance}; use 'sum' or a smaller tolerance.",
            stacklevel=3,
        )


def residuals_free(params: Float[Array, "6"], data) -> Float[Array, "n"]:
    """Observed minus fitted ln loss for `COEFFICIENTS`; data: ln N, ln D, ln loss."""
    a, b, e, alpha, beta, gamma = params
    log_n, log_d, log_loss = data
    token_term = b - beta * log_d
    inner = token_term + _softplus(a - alpha * log_n - token_term)
    return log_loss - (e + _softplus(gamma * inner - e))


def residuals_fixed(params: Float[Array, "5"], data) -> Float[Array, "n"]:
    """As `residuals_free`, with gamma = 1."""
    return residuals_free(jnp.append(params, 1.0), data)


@jax.custom_jvp
def _softplus(x: Float[Array, "n"]) -> Float[Array, "n"]:
    """log(1 + e^x): the log of a sum of two exps is y + softplus(x - y).

    Unlike those of `jnp.logaddexp`, its derivatives need no care for infinities, which halves the
    time of a fit.
    """
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


_softplus.defjvps(lambda tangent, _, x: tangent * jax.nn.sigmoid(x))


def _starts(starts: Starts, rng: np.random.Generator, *, free_gamma: bool) -> np.ndarray:
    values = GRID if free_gamma else GRID | {"gamma": (1.0,)}
    if starts is not None and not isinstance(starts, int):
        array = np.asarray(starts, np.float64)
        if array.ndim != 2 or array.shape[1] != len(COEFFICIENTS) or not len(array):
            raise ArgumentError(
                f"starts must have the shape (starts, 6), got {array.shape}; its columns are "
                f"{', '.join(COEFFICIENTS)}."
            )
        return array
    grid = np.array(list(itertools.product(*values.values())))
    if starts is None:
        return grid
    if starts < 1:
        raise ArgumentError(f"starts must be at least 1, got {starts}; 150 are ample.")
    return grid[rng.permutation(len(grid))[:starts]]


def _bootstrap(residuals, minimum: Minimum, data, weights, options) -> np.ndarray:
    """The best coefficients for each resample's weights, [bootstraps, coefficients]."""
    # Spread over the better half of the ends: other minima may become the best of a resample.
    order = np.argsort(minimum.objective)
    ranks = np.linspace(0, len(order) // 2, min(WARM_STARTS, len(order))).astype(int)
    warm = minimum.params[order[ranks]]
    first = np.tile(warm, (len(weights), 1))
    ends = minimize(residuals, first, data, np.repeat(weights, len(warm), axis=0), **options)
    best = ends.objective.reshape(len(weights), -1).argmin(axis=1)
    return ends.params.reshape(len(weights), len(warm), -1)[np.arange(len(weights)), best]


def _to_centered(coefficients: np.ndarray, centers: list[float]) -> np.ndarray:
    """Coefficients for ln N and ln D minus their means, which are far less correlated."""
    result = coefficients.copy()
    result[:, :2] -= result[:, 3:5] * np.array([centers])
    return result


def _from_centered(coefficients: np.ndarray, centers: list[float]) -> np.ndarray:
    """The inverse of `_to_centered`, with gamma = 1 where it is absent."""
    gamma = np.ones((len(coefficients), len(COEFFICIENTS) - coefficients.shape[1]))
    result = np.concatenate([coefficients, gamma], axis=1)
    result[:, :2] += result[:, 3:5] * np.array([centers])
    return result
