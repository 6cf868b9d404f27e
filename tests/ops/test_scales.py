"""Properties of the stabilizer: gates of any scale, and invariance to the log-scale m."""

import numpy as np
import pytest

from tests.ops import runs, tolerances
from tests.ops.subjects import (
    RANGE_F,
    RANGE_I,
    RANGE_LOG_F,
    XLSTM,
    L,
    Subject,
    T,
    both_dtypes,
    from_initial_state,
    make_case,
    pad,
    replace_third,
    subjects,
    with_flags,
)
from tests.ops.tolerances import TABLE

EXTREMES = [-200.0, 200.0]


def assert_finite(result):
    """Values, state and every gradient."""
    for leaf in (result.h, *result.state, *result.gradients.values()):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("scale", [0.1, 30.0])
@subjects(quick=XLSTM)
def test_gates_of_any_scale_equal_the_recurrence(subject, scale):
    tol = TABLE["float32"] if scale < 1 else TABLE["float32, large gates"]
    case = with_flags(make_case(subject.variant, T, gate_scale=scale), num_masked=13)
    runs.assert_equals_the_recurrence(subject, case, tol)


@pytest.mark.parametrize("closed_start", [False, True], ids=["", "closed start"])
@pytest.mark.parametrize("flags", [False, True], ids=["", "flags"])
@subjects(*XLSTM, quick=("mlstm", "mlstm_exp", "slstm"))
def test_gates_from_minus_infinity_to_1e30_equal_the_recurrence(subject, flags, closed_start):
    """A third of the gates is extreme; with `closed_start` no input gate opens for a chunk."""
    case = make_case(subject.variant, T)
    rng = np.random.default_rng([flags, closed_start])
    range_f = {"mlstm_exp": RANGE_LOG_F, "slstm_exp": [x for x in RANGE_F if x < 0]}
    range_f = range_f.get(subject.variant, RANGE_F)
    for gate, values in zip(_gates(case), (RANGE_I, range_f), strict=True):
        replace_third(rng, gate, values)
    if closed_start:
        _gates(case)[0][:, : L + 2] = -np.inf
        case = from_initial_state(case)
    case = with_flags(case, num_masked=3) if flags else case
    cotangents = runs.random_cotangents(subject.variant, case)
    actual = runs.run(subject, case, cotangents)
    # h of the sLSTM does not depend on the scale of c and n, so it depends on the rounding of gates
    # that are both far below 0: the recurrence is computed in float32, too.
    dtype = "float64" if subject.op == "mlstm" else "float32"
    expected = runs.run(Subject(subject.variant, "reference"), case, cotangents, dtype)
    runs.assert_results_close(actual, expected, TABLE["float32, large gates"])


@pytest.mark.parametrize("gate_i", [*EXTREMES, 0])
@subjects(*XLSTM)
def test_values_and_gradients_stay_finite_at_extreme_gates(subject, gate_i):
    """Constant pre-activations of +-200; `gate_i` of 0 stands for +-200 with random signs."""
    rng = np.random.default_rng(0)
    for gate_f in EXTREMES if gate_i else (0,):
        case = pad(make_case(subject.variant, T), T)
        i, f = _gates(case)
        i[...] = gate_i or 200 * rng.choice([-1.0, 1.0], i.shape)
        f[...] = gate_f or 200 * rng.choice([-1.0, 1.0], f.shape)
        for start in (case, from_initial_state(case)):
            cotangents = runs.random_cotangents(subject.variant, start)
            assert_finite(runs.run(subject, start, cotangents))


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["do not grow", "grow"])
@subjects("mlstm_exp", quick=("mlstm_exp",))
def test_forget_gates_above_one_over_4096_steps_equal_the_recurrence(subject, inputs):
    """m grows to thousands; C and n stay scaled. If input gates grow as well, they matter.

    In float32 m itself is rounded, and with it the scale of the state. The parallel form and
    interpreted kernels have 512 steps.
    """
    length = 4096 if subject.implementation in ("chunkwise", "recurrent") else 512
    case = _with_positive_normalizers(make_case(subject.variant, length))
    i, f = _gates(case)
    f[...] = np.float32(2.1 + 0.1 * f)
    i += 2 * np.arange(length)[None, :, None] * (inputs == "grow")
    cotangents = runs.random_cotangents(subject.variant, case)
    expected = runs.run_reference(subject.variant, case, cotangents)
    assert expected.state.m.min() > 1.9 * length
    actual = runs.run(subject, case, cotangents)
    assert_finite(actual)
    assert max(np.abs(leaf).max() for leaf in actual.state[:2]) < 100
    tolerances.assert_close(actual.h, expected.h, TABLE["float32, large gates"].h, "h")
    if subject.widest_dtype == "float64":
        actual = runs.run(subject, case, cotangents, "float64")
        runs.assert_results_close(actual, expected, TABLE["float64"])


@subjects("mlstm_exp", quick=("mlstm_exp",))
def test_a_state_scaled_by_1e30_has_the_weight_of_an_input_gate_of_1e30(subject):
    """Nothing but the log of that factor is rounded."""
    case = _with_positive_normalizers(make_case(subject.variant, T))
    i, f = _gates(case)
    f[:, L + 2], i[:, L + 5] = np.float32(1e30), np.float32(1e30)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float32"])


@subjects("mlstm_exp", quick=("mlstm_exp",))
def test_forget_gates_whose_logs_cancel_leave_results_finite(subject):
    """Their sums have rounding errors of thousands, but no step lets the state grow."""
    case = make_case(subject.variant, T)
    rng = np.random.default_rng(0)
    replace_third(rng, _gates(case)[1], [-3e11, -1e11, 1e11, 2e11])
    assert_finite(runs.run(subject, case, runs.zero_cotangents(subject.variant, case)))


def _with_positive_normalizers(case):
    """The call with positive q, k and n: exp(-m) is 0, so nothing else keeps q n away from 0."""
    inputs = {name: np.abs(x) if name in "qk" else x for name, x in case.inputs.items()}
    return case._replace(inputs=inputs, state=case.state._replace(n=np.abs(case.state.n)))


@pytest.mark.parametrize("eps", [True, False], ids=["eps", "no eps"])
@subjects("mlstm", "mlstm_sigmoid", quick=("mlstm",))
def test_zero_query_reads_zero_and_has_finite_gradients(subject, eps):
    """Also where exp(-m) has underflowed and the divisor is its lower bound.

    The square of that bound underflows, so gradients need eps.
    """
    case = pad(make_case(subject.variant, T), T)
    case.inputs["q"][:, ::3] = 0
    case.inputs["i"][:, ::2] = 200
    options = {} if eps else {"eps": 0.0}
    cotangents = runs.random_cotangents(subject.variant, case, **options)
    result = runs.run(subject, case, cotangents, **options)
    assert not result.h[:, ::3].any()
    assert_finite(result._replace(gradients=result.gradients if eps else {}))


@pytest.mark.slow
@pytest.mark.parametrize("shift", [-100.0, 50.0])
@subjects("mlstm", "mlstm_exp", "mlstm_sigmoid", "mlstm_unnormalized", "slstm", "slstm_exp")
def test_results_do_not_depend_on_the_log_scale_of_the_initial_state(subject, shift):
    """(C e^-c, n e^-c, m + c) is equivalent to (C, n, m), for every c at eps = 0."""
    dtype = subject.widest_dtype
    tol, options = TABLE[dtype], subject.exact("float64")
    case = with_flags(make_case(subject.variant, T), num_masked=13)
    case.reset[:, :L] = False  # so that outputs depend on the initial state
    shift = shift if dtype == "float64" else shift / 2  # exp(100) overflows float32
    c = shift * np.random.default_rng(0).random(case.state.m.shape)
    shifted = case._replace(state=_shift(case.state, c))
    cotangents = runs.random_cotangents(subject.variant, case, **options)
    expected = runs.run(subject, case, cotangents, dtype, **options)
    actual = runs.run(subject, shifted, cotangents, dtype, **options)
    gradients = dict(actual.gradients)
    for name in set(case.state._fields) - {"h", "m"}:
        gradient = gradients[f"state.{name}"]
        gradients[f"state.{name}"] = gradient * _scale_of(gradient, c)
    runs.assert_results_close(actual._replace(gradients=gradients), expected, tol)


def _shift(state, c):
    """The equivalent state with m + c instead of m."""
    leaves = {
        name: leaf * _scale_of(leaf, c)
        for name, leaf in state._asdict().items()
        if name not in ("h", "m")
    }
    return state._replace(**leaves, m=state.m + c)


def _scale_of(leaf, c):
    return np.exp(-c).reshape(c.shape + (1,) * (leaf.ndim - c.ndim))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
@subjects("slstm", "slstm_exp")
def test_slstm_is_bounded_at_any_gate_scale(subject, scale):
    """From the initial state on, |h| <= 1, n >= 1, and gradients are finite."""
    case = pad(from_initial_state(make_case(subject.variant, T, gate_scale=scale)), T)
    for t in range(1, T + 1, 4):
        case.mask[:] = np.arange(T) < t
        result = runs.run(subject, case, runs.random_cotangents(subject.variant, case))
        assert np.abs(result.h).max() <= 1
        assert result.state.n.min() >= 1
        assert_finite(result)


@pytest.mark.parametrize("gate_i", [-87.0, -100.0, -1e4])
@subjects("slstm", "slstm_exp")
def test_slstm_first_steps_have_exact_gradients_at_very_negative_input_gates(subject, gate_i):
    """exp(log f - i) overflows; neither values nor gradients may depend on it."""
    case = pad(from_initial_state(make_case(subject.variant, T)), T)
    case.inputs["x"][:, ::5, 0] = gate_i
    case.reset[:, ::5] = True
    cotangents = runs.random_cotangents(subject.variant, case)
    actual = runs.run(subject, case, cotangents)
    expected = runs.run_reference(subject.variant, case, cotangents)
    assert_finite(actual)
    tolerances.assert_close(actual.h, expected.h, TABLE["float32"].h, "h")
    tol = TABLE["float32, large gates"]
    tolerances.assert_gradients_close(actual.gradients, expected.gradients, tol)


@both_dtypes
@subjects("slstm", "slstm_exp")
def test_slstm_ignores_the_log_scale_where_n_is_zero(subject, dtype):
    """Elements with n = 0 next to others with n > 0: the first-step rule applies per element."""
    case = pad(make_case(subject.variant, T), T)
    is_initial = np.random.default_rng(0).random(case.state.n.shape) < 0.5
    c, n, _, m = (np.where(is_initial, 0, leaf) for leaf in case.state)
    state = type(case.state)(c, n, case.state.h, m)
    case = case._replace(state=state)
    cotangents = runs.random_cotangents(subject.variant, case, stored=True)
    clean = runs.run(subject, case, cotangents, dtype)
    garbage = case._replace(state=state._replace(m=np.where(is_initial, 77.0, m)))
    actual = runs.run(subject, garbage, cotangents, dtype)
    np.testing.assert_array_equal(actual.h, clean.h)
    for name, gradient in clean.gradients.items():
        np.testing.assert_array_equal(actual.gradients[name], gradient)
    assert not clean.gradients["state.m"][is_initial].any()
    expected = runs.run_reference(subject.variant, case, cotangents)
    tolerances.assert_close(clean.h, expected.h, TABLE[dtype].h, "h")
    tolerances.assert_gradients_close(clean.gradients, expected.gradients, TABLE[dtype])


def _gates(case):
    """Views of the input and forget pre-activations of a case."""
    if "x" in case.inputs:
        return case.inputs["x"][:, :, 0], case.inputs["x"][:, :, 1]
    return case.inputs["i"], case.inputs["f"]
