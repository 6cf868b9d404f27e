"""Properties in time: splitting, causality, packing and reversal, for values and gradients."""

import jax
import numpy as np
import pytest

from tests.ops import runs, tolerances
from tests.ops.subjects import (
    CHUNKED,
    PRIMARY,
    XLSTM,
    T,
    both_dtypes,
    from_initial_state,
    make_case,
    pad,
    pad_time,
    subjects,
    with_flags,
)
from tests.ops.tolerances import TABLE

DOCUMENTS = [(0, 7), (7, 8), (8, T)]  # start, stop


def _run_split(subject, case, cotangents, split, dtype, length, **options):
    """The calls before and after `split`, chained through the state and its cotangent."""
    cases = [case.slice(0, split), case.slice(split, case.length)]
    hs = [cotangents.h[:, :split], cotangents.h[:, split:]]
    if length is not None:
        cases = [pad(case, length) for case in cases]
        hs = [pad_time(h, length) for h in hs]
    zero = runs.zero_cotangents(subject.variant, cases[0])
    probe = runs.run(subject, cases[0], zero, dtype, **options)
    second = runs.run(
        subject,
        cases[1]._replace(state=probe.state),
        cotangents._replace(h=hs[1]),
        dtype,
        **options,
    )
    dstate = type(case.state)(*(second.gradients[f"state.{name}"] for name in case.state._fields))
    first = runs.run(subject, cases[0], zero._replace(h=hs[0], state=dstate), dtype, **options)
    return first, second


def _assert_split_changes_nothing(subject, case, split, dtype, length=None):
    tol, options = TABLE[dtype], subject.exact(dtype)
    cotangents = runs.random_cotangents(subject.variant, case, **options)
    expected = runs.run(subject, case, cotangents, dtype, **options)
    first, second = _run_split(subject, case, cotangents, split, dtype, length, **options)
    rest = case.length - split
    h = np.concatenate([first.h[:, :split], second.h[:, :rest]], axis=1)
    gradients = dict(first.gradients)
    for name in case.inputs:
        parts = [first.gradients[name][:, :split], second.gradients[name][:, :rest]]
        gradients[name] = np.concatenate(parts, axis=1)
    for name in case.weights:
        gradients[name] = first.gradients[name] + second.gradients[name]
    runs.assert_results_close(runs.Result(h, second.state, gradients), expected, tol)


@pytest.mark.parametrize("split", [7, 8, 9])
@subjects(quick=PRIMARY, only=CHUNKED)
def test_sequence_can_be_split_around_a_chunk_boundary(subject, split):
    _assert_split_changes_nothing(subject, make_case(subject.variant, 16), split, "float32")


@both_dtypes
@subjects(quick=PRIMARY)
def test_sequence_with_resets_and_masks_can_be_split_anywhere(subject, dtype):
    case = with_flags(make_case(subject.variant, T), num_masked=7)
    for split in (1, 7, 8, 9, 13, 25, T - 1):
        _assert_split_changes_nothing(subject, case, split, dtype, length=T)


@subjects()
def test_outputs_are_causal(subject):
    case = pad(make_case(subject.variant, T), T)
    for t in (0, 6, 7, 8, T - 2):
        gradients = _gradients_of_one_output(subject, case, t)
        for name in case.inputs:
            assert not gradients[name][:, t + 1 :].any(), f"h[{t}] depends on a later {name}"
        assert _all_inputs_matter(gradients, case, t)


@subjects()
def test_outputs_do_not_depend_on_inputs_before_a_reset(subject):
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
    zero = runs.zero_cotangents(subject.variant, case)
    h = np.zeros_like(zero.h)
    h[:, t] = np.random.default_rng(0).standard_normal(h[:, t].shape)
    return runs.run(subject, case, zero._replace(h=h), "float32").gradients


def _all_inputs_matter(gradients, case, t):
    """A gradient that is zero everywhere would pass the causality check."""
    return any(gradients[name][:, t].any() for name in case.inputs)


@both_dtypes
@subjects(quick=PRIMARY)
def test_packed_sequence_equals_its_separate_documents(subject, dtype):
    tol, options = TABLE[dtype], subject.exact(dtype)
    case = pad(make_case(subject.variant, T), T)
    for start, _ in DOCUMENTS:
        case.reset[:, start] = True
    cotangents = runs.random_cotangents(subject.variant, case, **options)
    packed = runs.run(subject, case, cotangents, dtype, **options)
    zero = runs.zero_cotangents(subject.variant, case)
    weights, gradients = {name: 0.0 for name in case.weights}, {name: [] for name in case.inputs}
    for start, stop in DOCUMENTS:
        document = pad(from_initial_state(make_case(subject.variant, T).slice(start, stop)), T)
        # The final state is that of the last document, so only its loss includes the state.
        loss = cotangents if stop == T else zero
        loss = loss._replace(h=pad_time(cotangents.h[:, start:stop], T))
        separate = runs.run(subject, document, loss, dtype, **options)
        n = stop - start
        tolerances.assert_close(packed.h[:, start:stop], separate.h[:, :n], tol.h, "h")
        for name in case.inputs:
            gradients[name].append(separate.gradients[name][:, :n])
        weights = {name: weights[name] + separate.gradients[name] for name in weights}
    # Together: in a document of one token, the gradient of f is the rounding error of the others.
    length = DOCUMENTS[-1][1]
    actual = {name: packed.gradients[name][:, :length] for name in case.inputs}
    expected = {name: np.concatenate(parts, axis=1) for name, parts in gradients.items()}
    tolerances.assert_gradients_close(actual, expected, tol)
    tolerances.assert_states_close(packed.state, separate.state, tol.state)
    for name in case.state._fields:
        assert not packed.gradients[f"state.{name}"].any()
    for name, expected in weights.items():
        tolerances.assert_close(packed.gradients[name], expected, tol.d_gates, f"d{name}")


@subjects(*XLSTM, quick=PRIMARY)
def test_reverse_flips_time_in_every_argument_and_in_h(subject):
    dtype = subject.widest_dtype
    tol, options = TABLE[dtype], subject.exact(dtype)
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
    runs.assert_results_close(actual, forward, tol)
