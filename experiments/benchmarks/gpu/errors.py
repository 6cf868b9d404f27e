"""Error measures of arrays, and the largest errors that are accepted."""

import numpy as np

LIMITS = {
    "float32": {"h": 1e-5, "state": 1e-5, "inputs": 2e-5, "gates": 5e-5},
    "bfloat16": {"h": 1e-2, "state": 1e-2, "inputs": 1.5e-2, "gates": 2e-2},
}
"""Of relative root-mean-square errors; `inputs` and `gates` are the gradients of those."""

GATES = ("i", "f", "m")  # m is an exponent, as the gates are


def error_limit(name: str, dtype: str) -> float:
    """Limit for h, a leaf of the state, or a gradient, whose name begins with d."""
    if not name.startswith("d"):
        return LIMITS[dtype]["h" if name == "h" else "state"]
    return LIMITS[dtype]["gates" if name[1:] in GATES else "inputs"]


def relative_error(x, y) -> float:
    """RMS of `x - y` over RMS of the expected `y`; NaN if any element of `x` is not finite."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not np.isfinite(x).all():
        return float("nan")
    return float(np.sqrt(np.mean((x - y) ** 2)) / max(np.sqrt(np.mean(y**2)), 1e-30))


def bitwise_equal(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> bool:
    """Whether all arrays are equal bit for bit; NaN may equal NaN."""
    return all(x[name].tobytes() == y[name].tobytes() for name in x)
