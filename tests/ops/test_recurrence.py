"""Every implementation equals the float64 recurrence, for values and all gradients."""

import pytest

from tests.ops import runs
from tests.ops.subjects import (
    CHUNKED,
    LENGTHS,
    OPTIONS,
    PRIMARY,
    XLSTM,
    T,
    make_case,
    pad,
    subjects,
    with_flags,
)
from tests.ops.tolerances import TABLE


@pytest.mark.parametrize("T", LENGTHS[1:-1], ids="T{}".format)
@subjects(quick=PRIMARY, only=CHUNKED)
def test_any_length_equals_the_recurrence(subject, T):
    """Lengths around the chunk size; the next test has a single step and the longest sequence."""
    case = make_case(subject.variant, T)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float32"], "float32", stored=True)


@pytest.mark.parametrize("T", [1, T], ids="T{}".format)
@subjects(quick=PRIMARY)
def test_single_step_and_long_sequence_equal_the_recurrence(subject, T):
    case = make_case(subject.variant, T)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float32"], "float32", stored=True)


@subjects(quick=tuple(OPTIONS), quick_kernels=True)
def test_resets_and_masks_equal_the_recurrence(subject):
    case = with_flags(make_case(subject.variant, T), num_masked=13)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float32"], "float32")


@subjects(quick=XLSTM)
def test_float64_equals_the_recurrence_up_to_rounding(subject):
    """The loss is on the leaves as stored, so the log-scales m agree as well."""
    case = pad(make_case(subject.variant, T), T)
    options = subject.exact("float64")
    runs.assert_equals_the_recurrence(
        subject, case, TABLE["float64"], "float64", stored=True, **options
    )


@pytest.mark.slow
@subjects("mlstm", "mlstm_sigmoid", "mlstm_unnormalized", "slstm", "lstm")
def test_errors_do_not_grow_with_the_length(subject):
    """No sum of log gates runs over all of T, so rounding errors do not grow with T.

    With an exponential forget gate m may grow with T, and so may its rounding error.
    """
    options = {"chunk_size": 64} if subject.op == "mlstm" else {}
    case = make_case(subject.variant, 300)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float32"], **options)
