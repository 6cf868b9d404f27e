"""Loading of golden vectors: results of other implementations, stored in `tests/golden`.

Files that are not in the repository are read from the folders XLSTM_REFERENCE_DATA, separated as in
PATH; if none has them, the test is skipped. If XLSTM_GOLDEN_ERRORS is the path of a file, every
comparison appends its error to it, for `golden/errors.py`.
"""

import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parent / "golden"

_loaded: list[str] = []  # the last one is the file that is being compared


class Golden(NamedTuple):
    """One file: arrays by flat key, and the config they were computed with."""

    arrays: dict[str, np.ndarray]
    config: dict[str, Any]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose keys start with `prefix`, by the remainder of their keys."""
        return {k.removeprefix(prefix): a for k, a in self.arrays.items() if k.startswith(prefix)}


def load(name: str) -> Golden:
    """Loads the golden file `name` (without suffix); skips the test if it is not available."""
    _loaded.append(name)
    path = FOLDER / f"{name}.npz"
    if path.exists():
        with np.load(path) as file:
            arrays = dict(file)
        return Golden(arrays, json.loads(str(arrays.pop("about")))["config"])
    path = reference(f"{name}.npz")
    with np.load(path) as file:
        arrays = dict(file)
    return Golden(arrays, json.loads(path.with_suffix(".json").read_text())["config"])


def reference(file: str) -> pathlib.Path:
    """The path of a file that is not in the repository; skips the test if it is not available."""
    folders = filter(None, os.environ.get("XLSTM_REFERENCE_DATA", "").split(os.pathsep))
    paths = [path for folder in folders if (path := pathlib.Path(folder) / file).is_file()]
    if not paths:
        pytest.skip(f"{file} is not in the repository; set XLSTM_REFERENCE_DATA to its folder")
    return paths[0]


def names(pattern: str) -> list[str]:
    """Files in the repository that match a glob pattern, without suffix."""
    return sorted(path.stem for path in FOLDER.glob(f"{pattern}.npz"))


def assert_matches(
    actual: np.ndarray, expected: np.ndarray, tolerance: float, name: str, largest: float = 0.0
):
    """Asserts max |actual - expected| <= tolerance * max |expected|.

    `largest` is the maximum over all gradients of a file. A much smaller gradient is compared
    relative to a thousandth of it instead.
    """
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape} != {expected.shape}"
    scale = max(np.abs(expected).max(), 1e-3 * largest)
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    _record(error / scale if error else 0.0, tolerance, is_gradient=largest > 0)
    assert error <= tolerance * scale, (
        f"{name}: largest error is {error / scale:.1e} of the maximum, allowed {tolerance:.0e}"
    )


def assert_all_match(actual: dict, expected: dict, tolerance: float):
    """`assert_matches` for every array of `expected`, the gradients of a file."""
    largest = max(np.abs(array).max() for array in expected.values())
    for name, array in expected.items():
        assert_matches(actual[name], array, tolerance, f"d{name}", largest)


def _record(error: float, tolerance: float, *, is_gradient: bool) -> None:
    path = os.environ.get("XLSTM_GOLDEN_ERRORS")
    if path is not None and _loaded:
        precision = "float64" if 0 < tolerance < 1e-9 else "float32"
        line = [_loaded[-1], precision, "gradients" if is_gradient else "values", float(error)]
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
