"""IsoFLOP parabolas: the best size at one compute budget, from runs that trade size and tokens.

Sources: arXiv:2203.15556 (approach 2), arXiv:2510.02228; the bias of the method: arXiv:2603.22339.
"""

from typing import NamedTuple

import numpy as np

from xlstm_jax.errors import ArgumentError
from xlstm_jax.scaling.checks import Column, points
from xlstm_jax.typing import Float


class Parabola(NamedTuple):
    """loss = a u^2 + b u + c with u = log10 x."""

    a: float
    b: float
    c: float
    x_opt: float  # x of the minimum; NaN unless a > 0
    loss_opt: float  # loss at the minimum
    covariance: Float[np.ndarray, "3 3"]  # of a, b, c; NaN for three points
    is_valid: bool  # convex, with its minimum inside the range of x
    num_points: int
    x_range: tuple[float, float]

    def __call__(self, x):
        """The loss at x, a number or an array."""
        u = np.log10(np.asarray(x, np.float64))
        return self.a * u**2 + self.b * u + self.c

    @property
    def problem(self) -> str:
        """Why the parabola is not valid, or an empty string."""
        if self.is_valid:
            return ""
        if not self.a > 0:
            return f"concave (a = {self.a:.4g})"
        low, high = self.x_range
        return f"minimum {self.x_opt:.4g} outside the runs, {low:.4g} to {high:.4g}"

    @property
    def log10_x_stderr(self) -> float:
        """Standard error of log10 x_opt, to first order in the scatter of the losses."""
        gradient = np.array([self.b / (2 * self.a**2), -1 / (2 * self.a), 0.0])
        return float(np.sqrt(max(gradient @ self.covariance @ gradient, 0.0)))


def fit_isoflop(x: Column, loss: Column) -> Parabola:
    """Least squares of a parabola in log10 x; a parabola without a usable minimum is flagged.

    Args:
        x: parameters, or tokens, of the runs of one budget.
        loss: nats per token; points with NaN are dropped.

    Raises:
        ArgumentError: shapes differ, values are not positive, or fewer than three different x.
    """
    (x, loss), _ = points(3, x=x, loss=loss)
    if len(set(x)) < 3:
        raise ArgumentError(
            f"x must have at least 3 different values for a parabola, got {len(set(x))} in "
            f"{len(x)} points; add runs of other sizes at this budget."
        )
    u = np.log10(x)
    center = u.mean()  # powers of u itself are nearly collinear
    design = np.vander(u - center, 3)
    centered = np.linalg.lstsq(design, loss, rcond=None)[0]
    residual = np.sum((loss - design @ centered) ** 2)
    variance = residual / (len(u) - 3) if len(u) > 3 else np.nan
    # From powers of u - center to powers of u.
    shift = np.array([[1, 0, 0], [-2 * center, 1, 0], [center**2, -center, 1]])
    a, b, c = shift @ centered
    covariance = variance * (shift @ np.linalg.inv(design.T @ design) @ shift.T)
    u_opt = center - centered[1] / (2 * a) if a > 0 else np.nan
    return Parabola(
        a=float(a),
        b=float(b),
        c=float(c),
        x_opt=float(10**u_opt),
        loss_opt=float(centered[2] - centered[1] ** 2 / (4 * a)),
        covariance=covariance,
        is_valid=bool(u.min() <= u_opt <= u.max()),
        num_points=len(u),
        x_range=(float(x.min()), float(x.max())),
    )
