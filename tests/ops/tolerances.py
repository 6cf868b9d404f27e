"""The table of tolerances per dtype, and the comparison that uses it.

Two arrays agree if the root mean square of the error is small relative to the root mean square of
the reference, and the 99.9 % quantile of the error is too. The reference is the float64 recurrence.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

TAIL = 10.0
"""Tolerance of the 99.9 % quantile of the error, as a multiple of that of its root mean square."""

FLOOR = 1e-3
"""Minimum scale of a gradient's error, as a fraction of the largest gradient of the call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Relative tolerances by kind of array."""

    h: float
    d_qkv: float
    d_gates: float  # pre-activations, weights and biases that make them, and the log-scale m
    state: float


TABLE = {
    "float32": Tolerances(h=1e-5, d_qkv=2e-5, d_gates=5e-5, state=1e-5),
    "float64": Tolerances(h=1e-10, d_qkv=1e-10, d_gates=1e-10, state=1e-10),
    "bfloat16": Tolerances(h=1e-2, d_qkv=1.5e-2, d_gates=2e-2, state=1e-2),
    # The rounding errors of sums of large gates have this size.
    "float32, large gates": Tolerances(h=1e-3, d_qkv=2e-3, d_gates=2e-3, state=1e-3),
}

GATES = ("i", "f", "x", "r", "b", "m")


def relative_error(actual: np.ndarray, expected: np.ndarray, scale: float) -> tuple[float, float]:
    """Root mean square and 99.9 % quantile of the error, in units of `scale`."""
    if not np.isfinite(actual).all():
        return np.inf, np.inf
    error = np.abs(np.asarray(actual, np.float64) - expected).ravel() / scale
    return float(np.sqrt(np.mean(error**2))), float(np.quantile(error, 0.999))


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, name: str, floor=0.0):
    """`actual` equals `expected` within `tolerance`; `floor` is the minimum scale of the error."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape} != {expected.shape}"
    if not expected.size:
        return
    scale = max(float(np.sqrt(np.mean(np.square(expected)))), floor)
    if scale == 0.0:
        assert not np.any(actual), f"{name}: must be zero, its largest element is {actual.max()}"
        return
    rms, tail = relative_error(actual, expected, scale)
    assert rms <= tolerance and tail <= TAIL * tolerance, (
        f"{name}: relative error {rms:.1e} (99.9 % quantile {tail:.1e}), allowed {tolerance:.0e}"
    )


def assert_gradients_close(actual: Mapping, expected: Mapping, tol: Tolerances):
    """All gradients of one call agree; both are mappings from argument name to gradient."""
    assert actual.keys() == expected.keys()
    largest = max(float(np.sqrt(np.mean(np.square(g)))) for g in expected.values() if g.size)
    for name, gradient in expected.items():
        tolerance = tol.d_gates if name.split(".")[-1] in GATES else tol.d_qkv
        assert_close(actual[name], gradient, tolerance, f"d{name}", floor=FLOOR * largest)


def assert_states_close(actual, expected, tolerance: float):
    """Two states agree once exp(m) is multiplied in; their log-scales m may differ."""
    for name, (a, b) in with_common_scale(actual, expected).items():
        assert_close(a, b, tolerance, f"state.{name}")


def with_common_scale(a, b) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Leaves of two states, in units of the larger of the two unscaled states.

    exp(m) may overflow. So only m minus the log of that size is exponentiated, at most at 700.
    """
    if not hasattr(a, "m"):
        return {name: (getattr(a, name), getattr(b, name)) for name in a._fields}
    scale = np.maximum(_log_size(a), _log_size(b))
    scale = np.where(np.isfinite(scale), scale, 0.0)
    names = [name for name in a._fields if name != "m"]
    return {name: (_rescaled(a, name, scale), _rescaled(b, name, scale)) for name in names}


def _rescaled(state, name: str, scale: np.ndarray) -> np.ndarray:
    leaf = getattr(state, name)
    if name == "h":  # has no scale divided out
        return leaf
    # Where C and n are 0, m is meaningless and may be far above the scale of the other state.
    factor = np.exp(np.minimum(state.m - scale, 700))
    return leaf * factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))


def _log_size(state) -> np.ndarray:
    """log of the largest unscaled entry that shares an m; -inf where C (or c) and n are 0."""
    memory, normalizer = (np.abs(leaf.reshape(state.m.shape + (-1,))) for leaf in state[:2])
    with np.errstate(divide="ignore"):
        return state.m + np.log(np.maximum(memory.max(-1), normalizer.max(-1)))
