"""Errors of arrays, and how large they may be."""

import numpy as np

LIMITS = {
    "float32": {"h": 1e-5, "memory": 1e-5, "inputs": 2e-5, "gates": 5e-5},
    "bfloat16": {"h": 1e-2, "memory": 1e-2, "inputs": 1.5e-2, "gates": 2e-2},
}
"""Of relative root-mean-square errors; `gates` are the gradients of i, f and m."""

GATES = ("i", "f", "m")


def limit(name: str, dtype: str) -> float:
    """Of the error of h, of a leaf of the state, or of a gradient, whose names begin with d."""
    if not name.startswith("d"):
        return LIMITS[dtype]["h" if name == "h" else "memory"]
    return LIMITS[dtype]["gates" if name[1:] in GATES else "inputs"]


def relative(x, y) -> float:
    """Root-mean-square error of `x` over that of `y`; NaN if any of `x` is not finite."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not np.isfinite(x).all():
        return float("nan")
    return float(np.sqrt(np.mean((x - y) ** 2)) / max(np.sqrt(np.mean(y**2)), 1e-30))


def identical(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> bool:
    """Whether all arrays have the same bits."""
    return all(x[name].tobytes() == y[name].tobytes() for name in x)
