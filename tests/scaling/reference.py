"""Run tables that are not in the repository: the published study's, for comparison."""

import csv
import functools
import os
import pathlib

import numpy as np
import pytest

from xlstm_jax import scaling
from xlstm_jax.scaling import Condition

SUBFOLDER = "scaling_laws"


def path(name: str) -> pathlib.Path:
    """The path of a table; skips the test unless XLSTM_REFERENCE_DATA has it."""
    folders = filter(None, os.environ.get("XLSTM_REFERENCE_DATA", "").split(os.pathsep))
    paths = [
        file
        for folder in folders
        for parent in (pathlib.Path(folder), pathlib.Path(folder, SUBFOLDER))
        if (file := parent / name).is_file()
    ]
    if not paths:
        pytest.skip(f"{name} is not in the repository; set XLSTM_REFERENCE_DATA to its folder")
    return paths[0]


def read(name: str) -> list[dict[str, str]]:
    """The records of a table of published results."""
    with path(name).open() as file:
        return list(csv.DictReader(file))


@functools.cache
def _runs(file: pathlib.Path) -> scaling.Runs:
    return scaling.read_table(file)


def selected(**values: str | float) -> scaling.Runs:
    """The runs of the study's analysis for which columns have these values."""
    runs = _runs(path("runs.csv"))
    for column, value in ({"selected": "True"} | values).items():
        runs = runs.select(Condition(column=column, values=(value,)).holds(runs))
    return runs


def numbers(runs: scaling.Runs, column: str) -> np.ndarray:
    """A column as numbers; NaN for its words, such as "extra"."""
    text = runs[column].astype(str)
    return np.array([float(x) if x and x[0].isdigit() else np.nan for x in text])
