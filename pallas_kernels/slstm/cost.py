"""Work and traffic of the sLSTM kernels by formula, for XLA's scheduler.

A step of a head multiplies `K` by `K 4K`, forward and backward; what is left is a count of what is
done to single numbers.
"""

from collections.abc import Sequence
from typing import Any

from jax.experimental import pallas as pl


def forward(elements: int, K: int, forget_gate: str, arrays: Sequence[Any]) -> pl.CostEstimate:
    """Of `elements` numbers of h; `arrays` are all operands and results, each moved once."""
    exponentials = 6 if forget_gate == "sigmoid" else 4
    return _estimate(elements, 8 * K + 20, exponentials, arrays)


def backward(elements: int, K: int, forget_gate: str, arrays: Sequence[Any]) -> pl.CostEstimate:
    """As `forward`, for its gradient."""
    exponentials = 8 if forget_gate == "sigmoid" else 5
    return _estimate(elements, 8 * K + 60, exponentials, arrays)


def _estimate(elements, operations, exponentials, arrays) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=elements * operations,
        transcendentals=elements * exponentials,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays),
    )
