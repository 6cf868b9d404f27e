"""Every implementation equals the float64 recurrence, in values and in all gradients."""

import numpy as np
import pytest

from tests.ops import runs, tolerances
from tests.ops.subjects import LENGTHS, empty, make_case, subjects, with_flags
from tests.ops.tolerances import TABLE


def assert_equals_the_recurrence(subject, case, row, dtype, *, stored=False, **options):
    """Values, final state and gradients of one call agree with the recurrence."""
    cotangents = runs.random_cotangents(subject.variant, case, stored=stored, **options)
    actual = runs.run(subject, case, cotangents, dtype, **options)
    expected = runs.run_truth(subject.variant, case, cotangents, **options)
    tolerances.assert_close(actual.h, expected.h, row.h, "h")
    tolerances.assert_states_close(actual.state, expected.state, row.state)
    tolerances.assert_gradients_close(actual.gradients, expected.gradients, row)


@pytest.mark.parametrize("T", LENGTHS, ids="T{}".format)
@subjects()
def test_any_length_equals_the_recurrence(subject, T):
    case = make_case(subject.variant, T)
    assert_equals_the_recurrence(subject, case, TABLE["float32"], "float32", stored=True)


@subjects()
def test_resets_and_masks_equal_the_recurrence(subject):
    case = with_flags(make_case(subject.variant, 29), num_masked=13)
    assert_equals_the_recurrence(subject, case, TABLE["float32"], "float32")


@subjects()
def test_float64_equals_the_recurrence_to_rounding(subject):
    """A loss on the stored leaves, not only on the memory: the log-scales m agree as well."""
    case = make_case(subject.variant, 29)
    assert_equals_the_recurrence(subject, case, TABLE["float64"], "float64", stored=True)
