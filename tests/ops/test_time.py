"""Properties in time: splitting, causality, packing and reversal, in values and gradients."""

import jax
import numpy as np
import pytest

from tests.ops import runs, tolerances
from tests.ops.subjects import (
    CHUNKED,
    PRIMARY,
    T,
    both_dtypes,
    empty,
    make_case,
    pad,
    pad_time,
    subjects,
    with_flags,
)
from tests.ops.tolerances import TABLE

DOCUMENTS = [(0, 7), (7, 8), (8, T)]  # from, to


def _run_in_two(subject, case, cotangents, cut, dtype, length, **options):
    """The call up to `cut` and from there, chained through the state and its cotangent."""
    spans = [case.span(0, cut), case.span(cut, case.length)]
    hs = [cotangents.h[:, :cut], cotangents.h[:, cut:]]
    if length is not None:
        spans = [pad(span, length) for span in spans]
        hs = [pad_time(h, length) for h in hs]
    silent = runs.no_cotangents(subject.variant, spans[0])
    probe = runs.run(subject, spans[0], silent, dtype, **options)
    second = runs.run(
        subject,
        spans[1]._replace(state=probe.state),
        cotangents._replace(h=hs[1]),
        dtype,
        **options,
    )
    leaving = type(case.state)(*(second.gradients[f"state.{name}"] for name in case.state._fields))
    first = runs.run(subject, spans[0], silent._replace(h=hs[0], state=leaving), dtype, **options)
    return first, second


def _assert_two_make_one(subject, case, cut, dtype, length=None):
    row, options = TABLE[dtype], subject.exact(dtype)
    cotangents = runs.random_cotangents(subject.variant, case, **options)
    whole = runs.run(subject, case, cotangents, dtype, **options)
    first, second = _run_in_two(subject, case, cotangents, cut, dtype, length, **options)
    rest = case.length - cut
    h = np.concatenate([first.h[:, :cut], second.h[:, :rest]], axis=1)
    gradients = dict(first.gradients)
    for name in case.inputs:
        parts = [first.gradients[name][:, :cut], second.gradients[name][:, :rest]]
        gradients[name] = np.concatenate(parts, axis=1)
    for name in case.weights:
        gradients[name] = first.gradients[name] + second.gradients[name]
    runs.assert_results_close(runs.Result(h, second.state, gradients), whole, row)


@pytest.mark.parametrize("cut", [7, 8, 9])
@subjects(quick=PRIMARY, among=CHUNKED)
def test_a_sequence_can_be_split_around_a_chunk_border(subject, cut):
    _assert_two_make_one(subject, make_case(subject.variant, 16), cut, "float32")


@both_dtypes
@subjects(quick=PRIMARY)
def test_a_sequence_with_resets_and_masks_can_be_split_anywhere(subject, dtype):
    case = with_flags(make_case(subject.variant, T), num_masked=7)
    for cut in (1, 4, 7, 8, 9, 11, 13, 16, 19, 23, 25, T - 1):
        _assert_two_make_one(subject, case, cut, dtype, length=T)


@subjects()
def test_no_output_depends_on_a_later_input(subject):
    case = pad(make_case(subject.variant, T), T)
    for t in (0, 6, 7, 8, T - 2):
        gradients = _gradients_of_one_output(subject, case, t)
        for name in case.inputs:
            assert not gradients[name][:, t + 1 :].any(), f"h[{t}] depends on a later {name}"
        assert _all_inputs_matter(gradients, case, t)


@subjects()
def test_no_output_depends_on_anything_before_its_reset(subject):
    case = pad(make_case(subject.variant, T), T)
    for reset, t in ((0, 0), (5, 6), (5, 13), (8, 8), (8, 15), (T - 1, T - 1)):
        case.reset[:] = False
        case.reset[:, reset] = True
        gradients = _gradients_of_one_output(subject, case, t)
        for name in case.inputs:
            assert not gradients[name][:, :reset].any(), f"h[{t}] depends on {name} before a reset"
        for name in case.state._fields:
            assert not gradients[f"state.{name}"].any(), f"h[{t}] depends on the state's {name}"
        assert _all_inputs_matter(gradients, case, t)


def _gradients_of_one_output(subject, case, t):
    silent = runs.no_cotangents(subject.variant, case)
    h = np.zeros_like(silent.h)
    h[:, t] = np.random.default_rng(0).standard_normal(h[:, t].shape)
    return runs.run(subject, case, silent._replace(h=h), "float32").gradients


def _all_inputs_matter(gradients, case, t):
    """So that a gradient that is zero everywhere cannot pass for a causal one."""
    return any(gradients[name][:, t].any() for name in case.inputs)


@both_dtypes
@subjects(quick=PRIMARY)
def test_a_packed_sequence_equals_its_documents_apart(subject, dtype):
    row, options = TABLE[dtype], subject.exact(dtype)
    case = pad(make_case(subject.variant, T), T)
    for start, _ in DOCUMENTS:
        case.reset[:, start] = True
    cotangents = runs.random_cotangents(subject.variant, case, **options)
    packed = runs.run(subject, case, cotangents, dtype, **options)
    silent = runs.no_cotangents(subject.variant, case)
    weights = {name: 0.0 for name in case.weights}
    for start, stop in DOCUMENTS:
        document = pad(empty(make_case(subject.variant, T).span(start, stop)), T)
        # The final state is that of the last document: only its loss sees it.
        loss = cotangents if stop == T else silent
        loss = loss._replace(h=pad_time(cotangents.h[:, start:stop], T))
        apart = runs.run(subject, document, loss, dtype, **options)
        n = stop - start
        tolerances.assert_close(packed.h[:, start:stop], apart.h[:, :n], row.h, "h")
        gradients = {name: packed.gradients[name][:, start:stop] for name in case.inputs}
        expected = {name: apart.gradients[name][:, :n] for name in case.inputs}
        tolerances.assert_gradients_close(gradients, expected, row)
        weights = {name: weights[name] + apart.gradients[name] for name in weights}
    tolerances.assert_states_close(packed.state, apart.state, row.state)
    for name in case.state._fields:
        assert not packed.gradients[f"state.{name}"].any()
    for name, expected in weights.items():
        tolerances.assert_close(packed.gradients[name], expected, row.d_gates, f"d{name}")


@subjects(quick=PRIMARY)
def test_reverse_flips_time_in_every_argument_and_in_h(subject):
    dtype = subject.widest
    row, options = TABLE[dtype], subject.exact(dtype)
    case = with_flags(make_case(subject.variant, T), num_masked=7)
    cotangents = runs.random_cotangents(subject.variant, case, **options)
    forward = runs.run(subject, case, cotangents, dtype, **options)
    flip = lambda x: np.flip(x, axis=1)  # noqa: E731
    inputs = jax.tree.map(flip, case.inputs)
    flipped = case._replace(inputs=inputs, reset=flip(case.reset), mask=flip(case.mask))
    loss = cotangents._replace(h=flip(cotangents.h))
    backward = runs.run(subject, flipped, loss, dtype, reverse=True, **options)
    gradients = {
        name: flip(gradient) if name in inputs else gradient
        for name, gradient in backward.gradients.items()
    }
    actual = runs.Result(flip(backward.h), backward.state, gradients)
    runs.assert_results_close(actual, forward, row)
