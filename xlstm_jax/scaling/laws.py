"""Straight lines in logarithms: compute-optimal power laws, and loss at fixed tokens per parameter.

Sources: arXiv:2203.15556 (approach 2), arXiv:2510.02228.
"""

from typing import NamedTuple

import numpy as np

from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.scaling.checks import Column, points
from xlstm_jax.typing import Float


class PowerLaw(NamedTuple):
    """x = prefactor * flops ** exponent."""

    prefactor: float
    exponent: float
    prefactor_stderr: float  # standard errors are NaN for two points
    exponent_stderr: float
    num_points: int
    covariance: Float[np.ndarray, "2 2"]  # of ln prefactor and exponent

    def __call__(self, flops):
        """x at a budget or at an array of budgets."""
        return self.prefactor * np.asarray(flops, np.float64) ** self.exponent

    def inverse(self, x):
        """The budget in FLOPs whose optimum is x."""
        return (np.asarray(x, np.float64) / self.prefactor) ** (1 / self.exponent)

    def log_stderr(self, flops: float) -> float:
        """Standard error of ln x at a budget, from the scatter of the points alone."""
        return _stderr_at(self.covariance, flops)


class Line(NamedTuple):
    """ln loss = slope * ln flops + intercept."""

    slope: float
    intercept: float
    slope_stderr: float  # standard errors are NaN for two points
    intercept_stderr: float
    num_points: int
    covariance: Float[np.ndarray, "2 2"]  # of intercept and slope

    def __call__(self, flops):
        """The loss at a budget or at an array of budgets."""
        return np.exp(self.intercept + self.slope * np.log(np.asarray(flops, np.float64)))

    def log_stderr(self, flops: float) -> float:
        """Standard error of ln loss at a budget, from the scatter of the points alone."""
        return _stderr_at(self.covariance, flops)


def fit_power_law(
    x_opt: Column, flops: Column, *, flops_range: tuple[float, float] | None = None
) -> PowerLaw:
    """Least squares of ln x_opt over ln flops.

    Args:
        x_opt: compute-optimal parameters or tokens of each budget.
        flops: mean FLOPs of the runs of each budget, rather than its label.
        flops_range: smallest and largest FLOPs of the points that are used; None: all.

    Raises:
        ArgumentError: shapes differ, values are not positive, or fewer than two points remain.
    """
    (x_opt, flops), _ = points(2, x_opt=x_opt, flops=flops)
    if flops_range is not None:
        is_inside = (flops >= flops_range[0]) & (flops <= flops_range[1])
        if is_inside.sum() < 2:
            raise ArgumentError(
                f"flops_range={quote(flops_range)} must contain at least two points, got "
                f"{is_inside.sum()} of {len(flops)}; widen it."
            )
        x_opt, flops = x_opt[is_inside], flops[is_inside]
    intercept, slope, covariance = _line(np.log(flops), np.log(x_opt))
    prefactor = float(np.exp(intercept))
    stderrs = np.sqrt(np.diagonal(covariance))
    return PowerLaw(
        prefactor=prefactor,
        exponent=slope,
        prefactor_stderr=prefactor * float(stderrs[0]),
        exponent_stderr=float(stderrs[1]),
        num_points=len(flops),
        covariance=covariance,
    )


def fit_fixed_ratio(flops: Column, loss: Column) -> Line:
    """Least squares of ln loss over ln flops, for runs with equal tokens per parameter.

    Raises:
        ArgumentError: shapes differ, values are not positive, or there are fewer than two points.
    """
    (flops, loss), _ = points(2, flops=flops, loss=loss)
    intercept, slope, covariance = _line(np.log(flops), np.log(loss))
    stderrs = np.sqrt(np.diagonal(covariance))
    return Line(slope, intercept, float(stderrs[1]), float(stderrs[0]), len(flops), covariance)


def _line(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]):
    """Intercept and slope of the least-squares line, and their covariance."""
    center = x.mean()
    spread = np.sum((x - center) ** 2)
    if spread == 0:
        raise ArgumentError(
            f"flops must have at least two different values, got {np.exp(center):.4g} for all "
            f"{len(x)} points; add other budgets."
        )
    slope = float(np.sum((x - center) * y) / spread)
    intercept = float(y.mean() - slope * center)
    variance = np.nan
    if len(x) > 2:
        variance = np.sum((y - intercept - slope * x) ** 2) / (len(x) - 2)
    inverse = np.array([[1 / len(x) + center**2 / spread, -center / spread], [0, 1 / spread]])
    inverse[1, 0] = inverse[0, 1]
    return intercept, slope, variance * inverse


def _stderr_at(covariance: Float[np.ndarray, "2 2"], flops: float) -> float:
    x = np.array([1.0, np.log(flops)])
    return float(np.sqrt(max(x @ covariance @ x, 0.0)))
