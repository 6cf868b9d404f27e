"""Checks of the columns that fits receive, and errors of what they predict."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.typing import Float, Shaped

Column = Shaped[np.ndarray, "n"] | Sequence[float]
"""One value of each of n runs."""


class Points(NamedTuple):
    """Columns of equal length without missing values."""

    columns: tuple[Float[np.ndarray, "n"], ...]
    num_dropped: int  # points with a NaN


def points(minimum: int, **columns: Column) -> Points:
    """The columns in float64, without the points that have a NaN.

    Args:
        minimum: number of points that the fit needs.

    Raises:
        ArgumentError: shapes differ or are not `n`, a value is not positive and finite, or fewer
            than `minimum` points remain.
    """
    arrays = {name: np.asarray(column, np.float64) for name, column in columns.items()}
    same_shape(**arrays)
    is_missing = np.any([np.isnan(array) for array in arrays.values()], axis=0)
    arrays = {name: array[~is_missing] for name, array in arrays.items()}
    for name, array in arrays.items():
        is_bad = ~(np.isfinite(array) & (array > 0))
        if is_bad.any():
            where = int(np.argmax(is_bad))
            raise ArgumentError(
                f"{name} must be positive and finite, got {array[where]} for point {where} of "
                f"{len(array)}; remove or correct it."
            )
    count = int((~is_missing).sum())
    if count < minimum:
        raise ArgumentError(
            f"{', '.join(columns)} must have at least {minimum} points for this fit, got {count}"
            f"{' after dropping NaN' if is_missing.any() else ''}; add runs."
        )
    return Points(tuple(arrays.values()), int(is_missing.sum()))


def same_shape(**arrays: np.ndarray) -> None:
    """Raises ArgumentError unless all arrays are vectors of one length.

    NumPy would broadcast (n, 1) minus (n,) to (n, n), and the error of a fit would be meaningless.
    """
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        text = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ArgumentError(
            f"columns must be vectors of one length, got shapes {quote(text)}; flatten them."
        )


class Errors(NamedTuple):
    """Differences between predicted and observed losses, in nats."""

    rms: float
    largest: float  # in magnitude
    mean: float  # predicted minus observed
    r_squared: float  # 1 - residual / total sum of squares; NaN if all observations are equal


def prediction_errors(predicted: Column, observed: Column) -> Errors:
    """Errors of predicted losses; raises ArgumentError if the shapes differ."""
    predicted, observed = np.asarray(predicted, np.float64), np.asarray(observed, np.float64)
    same_shape(predicted=predicted, observed=observed)
    errors = predicted - observed
    total = np.sum((observed - observed.mean()) ** 2)
    r_squared = 1 - np.sum(errors**2) / total if total > 0 else np.nan
    rms = np.sqrt(np.mean(errors**2))
    return Errors(*map(float, (rms, np.abs(errors).max(), errors.mean(), r_squared)))
