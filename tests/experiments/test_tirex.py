"""The script for TiRex-2: CSV files, criteria, short runs with random and loaded weights."""

import json

import numpy as np
import pytest

from experiments import tirex as script
from tests import golden_files
from xlstm_jax.errors import ConfigError

CSV = """date,sales,price,holiday
2026-01-01,1.5,7,0
2026-01-02,,8,1
2026-01-03,2.5,,0
2026-01-04,,,1
2026-01-05,,,0
"""


@pytest.fixture
def path(tmp_path):
    """A file with three time steps of a target, and two more of a known covariate."""
    path = tmp_path / "sales.csv"
    path.write_text(CSV)
    return path


def test_columns_become_targets_and_covariates(path, capsys):
    series = script.read_series(path, past=("price",), future=("holiday",))
    np.testing.assert_array_equal(series.targets, [[1.5, np.nan, 2.5]])
    np.testing.assert_array_equal(series.past, [[7, 8, np.nan]])
    np.testing.assert_array_equal(series.future, [[0, 1, 0, 1, 0]])
    assert "'date' of sales.csv is ignored" in capsys.readouterr().out
    all_targets = script.read_series(path, (), ())
    assert all_targets.targets.shape == (3, 5)
    assert all_targets.past is None and all_targets.future is None


@pytest.mark.parametrize(
    "past, future, demand",
    [
        (("cost",), (), "'cost' must be a column of numbers"),
        ((), ("date",), "'date' must be a column of numbers"),
        (("sales",), ("price", "holiday"), "must have a column of targets"),
    ],
)
def test_columns_that_do_not_exist_are_named(path, past, future, demand):
    with pytest.raises(ConfigError, match=demand):
        script.read_series(path, past, future)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    for name in ("missing.csv", "empty.csv"):
        with pytest.raises(ConfigError, match=f"{name} must be a CSV file with a header"):
            script.read_series(tmp_path / name, (), ())


def test_streams_must_agree_and_cost_less():
    def streams(difference, patch):
        return [{"difference": difference, "seconds": {"patch": patch, "forecast": 1.0}}]

    assert list(script.outcome(streams(1e-5, 0.4)).values()) == [True, True]
    assert list(script.outcome(streams(1e-3, 0.6)).values()) == [False, False]
    assert script.outcome([]) == {}


@pytest.mark.slow
def test_the_smallest_size_and_loaded_weights_write_results(tmp_path, path, monkeypatch, capsys):
    monkeypatch.setattr(script.cpu, "prepare", lambda: True)
    out = tmp_path / "r.json"
    assert script.main(script.Options(size="smoke", out=out)) == 0
    (stream,) = json.loads(out.read_text())["streams"]
    assert stream["patches"] == 4 and stream["difference"] < 1e-4
    assert "random weights: forecasts mean nothing" in capsys.readouterr().out
    weights = str(golden_files.FOLDER / "tirex2_tiny")
    options = {"future": ("holiday",), "past": ("price",), "horizon": 2}
    assert script.main(script.Options(weights=weights, series=(path,), out=out, **options)) == 0
    result = json.loads(out.read_text())
    assert (result["weights"], result["outcome"]) == (weights, {})
    assert "not streamed" in capsys.readouterr().out
    assert 0 < (tmp_path / "r.png").stat().st_size < 300 * 1024
