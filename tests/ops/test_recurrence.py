"""Every implementation equals the float64 recurrence, in values and in all gradients."""

import pytest

from tests.ops import runs
from tests.ops.subjects import CHUNKED, LENGTHS, PRIMARY, T, make_case, pad, subjects, with_flags
from tests.ops.tolerances import TABLE


@pytest.mark.parametrize("T", LENGTHS[1:-1], ids="T{}".format)
@subjects(quick=PRIMARY, among=CHUNKED)
def test_any_length_equals_the_recurrence(subject, T):
    """Those around the length of a chunk; one step and the longest are in the next test."""
    case = make_case(subject.variant, T)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float32"], "float32", stored=True)


@pytest.mark.parametrize("T", [1, T], ids="T{}".format)
@subjects(quick=PRIMARY)
def test_one_step_and_many_equal_the_recurrence(subject, T):
    case = make_case(subject.variant, T)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float32"], "float32", stored=True)


@subjects(quick_kernels=True)
def test_resets_and_masks_equal_the_recurrence(subject):
    case = with_flags(make_case(subject.variant, T), num_masked=13)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float32"], "float32")


@subjects()
def test_float64_equals_the_recurrence_to_rounding(subject):
    """A loss on the stored leaves, not only on the memory: the log-scales m agree as well."""
    case = pad(make_case(subject.variant, T), T)
    options = subject.exact("float64")
    runs.assert_equals_the_recurrence(
        subject, case, TABLE["float64"], "float64", stored=True, **options
    )


@pytest.mark.slow
@subjects("mlstm", "mlstm_sigmoid", "mlstm_unnormalized", "slstm", "lstm")
def test_long_sequences_keep_the_digits(subject):
    """No sum of log gates runs over all of T, so errors do not grow with it.

    With an exponential forget gate m itself may grow with T, and its rounding with it.
    """
    options = {"chunk_size": 64} if subject.op == "mlstm" else {}
    case = make_case(subject.variant, 300)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float32"], **options)
