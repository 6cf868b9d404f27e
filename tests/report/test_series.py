"""Records become columns, and thinning keeps what a reader looks for."""

import numpy as np
import pytest

from tests.report.records import train_record
from xlstm_jax.report.series import make_table, thin, to_json, training_seconds, with_axes


@pytest.mark.parametrize("limit", [24, 300, 2000])
def test_thinning_keeps_the_extremes_and_ends_of_every_column(limit, rng):
    columns = rng.standard_normal((5, 100_000))
    index = thin(columns, limit)
    assert len(index) <= limit and (np.diff(index) > 0).all()
    assert {0, 99_999, *columns.argmin(1), *columns.argmax(1)} <= set(index)


def test_thinning_keeps_the_extremes_of_every_part_of_a_curve(rng):
    values = rng.standard_normal(50_000)
    selected = values[thin(values[None], 2000)]
    # A part of a tenth of the curve has the same range before and after.
    for part, thinned in zip(np.split(values, 10), np.array_split(selected, 10), strict=True):
        assert abs(thinned.max() - part.max()) < 0.5 and abs(thinned.min() - part.min()) < 0.5


def test_thinning_keeps_gaps():
    values = np.ones((2, 10_000))
    values[0, 7_777] = np.nan
    assert 7_777 in thin(values, 500)


def test_few_records_are_not_thinned():
    np.testing.assert_array_equal(thin(np.ones((3, 7)), 7), np.arange(7))


def test_limit_below_the_number_of_extremes_keeps_evenly_spaced_records():
    for limit in (2, 3, 11):
        index = thin(np.zeros((50, 1000)), limit)
        np.testing.assert_array_equal(index, np.linspace(0, 999, limit).astype(int))
    assert thin(np.zeros((50, 1000)), 1) == 999


def test_last_record_of_a_repeated_step_counts_and_steps_are_in_order():
    records = [{"step": 20, "loss": 2.0}, {"step": 10, "loss": 3.0}, {"step": 20, "loss": 1.0}]
    table = make_table(records, ["loss", "mfu"])
    assert {name: list(x) for name, x in table.items()} == {"step": [10, 20], "loss": [3, 1]}


@pytest.mark.parametrize("value", [None, "1", [1], True, {"a": 1}])
def test_what_is_no_number_is_missing(value):
    table = make_table([{"step": 1, "loss": value}, {"step": 2, "loss": 5}], ["loss"])
    np.testing.assert_array_equal(table["loss"], [np.nan, 5])


def test_time_is_the_sum_of_the_steps_also_of_an_interval_without_a_step_time():
    first = {x: v for x, v in train_record(10).items() if x != "step_time"}
    records = [first, train_record(20), train_record(40, step_time=1.0)]
    table = training_seconds(make_table(records, [*first, "step_time"]))
    np.testing.assert_allclose(table["seconds"], [5, 10, 30])


def test_axes_of_evaluations_are_interpolated_between_training_records():
    train = {"step": np.array([10.0, 20.0]), "tokens_seen": np.array([100.0, 300.0])}
    table = with_axes({"step": np.array([5.0, 15.0, 99.0])}, train)
    np.testing.assert_allclose(table["tokens_seen"], [50, 200, 300])


def test_json_values_are_exact_integers_and_rounded_numbers():
    values = np.array([3.0, 1 / 3, np.nan, np.inf, 1e300])
    assert to_json(values) == [3, 0.33333, None, None, 1e300]
