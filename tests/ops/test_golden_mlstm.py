"""The mLSTM against golden files: every implementation, and the cell."""

import jax
import numpy as np
import pytest

from pallas_kernels import common
from tests import golden_files
from tests.ops import runs, tolerances
from tests.ops.subjects import Case, L, Subject, implementations
from xlstm_jax import cells

NAMES = [
    name for name in golden_files.names("mlstm_cell_*") if name != "mlstm_cell_sigmoid_input_gate"
]
LARGE_GATES = ("mlstm_cell_extreme_gates", "mlstm_cell_long512_large")
KEYS = {"C": "c", "n": "n", "m": "m"}

# `recurrent` is the scan of the cell, so the cell alone may be slow; `parallel` runs the same
# program for all gates, so the files hardly differ for it.
every_implementation = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(
            implementation,
            marks=[pytest.mark.slow] if implementation in ("parallel", "cell") else [],
        )
        for implementation in [*implementations("mlstm"), "cell"]
    ],
)
dtypes = pytest.mark.parametrize(
    "dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)]
)


def _time_second(x: np.ndarray) -> np.ndarray:
    """`B H T ...` of the files to our `B T H ...`."""
    return np.swapaxes(x, 1, 2).astype(np.float64)


def _initial(inputs: dict[str, np.ndarray]) -> cells.MLSTMState:
    B, H, _, K = inputs["q"].shape
    V = inputs["v"].shape[-1]
    shapes = {"C": (B, H, K, V), "n": (B, H, K), "m": (B, H)}
    leaves = {
        leaf: inputs.get(f"{key}_initial", np.zeros(shapes[leaf])).reshape(shapes[leaf])
        for leaf, key in KEYS.items()
    }
    return jax.tree.map(np.float64, cells.MLSTMState(**leaves))


def _case(inputs: dict[str, np.ndarray]) -> Case:
    return Case({name: _time_second(inputs[name]) for name in "qkvif"}, {}, _initial(inputs))


def _run(implementation, case, cotangents, dtype, variant="mlstm", **options):
    refusal = implementations("mlstm").get(implementation)
    if refusal is not None:
        pytest.skip(refusal)
    if implementation == "cell":
        options.pop("chunk_size")
    subject = Subject(variant, "reference" if implementation == "cell" else implementation)
    if subject.is_kernel:
        options["chunk_size"] = common.round_up(options["chunk_size"], L)
    return runs.run(subject, case, cotangents, dtype, **options)


def _gradients(arrays: dict[str, np.ndarray], like: cells.MLSTMState) -> dict[str, np.ndarray]:
    """Gradients of a golden file, by our argument names and in our layout."""
    gradients = {name: _time_second(arrays[name]) for name in "qkvif"}
    for leaf, key in KEYS.items():
        if f"{key}_initial" in arrays:
            shape = getattr(like, leaf).shape
            gradients[f"state.{leaf}"] = arrays[f"{key}_initial"].reshape(shape)
    return gradients


def _tolerances(name: str, dtype: str, bits: str) -> tuple[float, float]:
    if name in LARGE_GATES and dtype == "float32":
        return 1e-3, 2e-3
    return (1e-10, 1e-10) if dtype == "float64" and bits == "64" else (2e-5, 2e-4)


@dtypes
@every_implementation
@pytest.mark.parametrize("name", NAMES)
def test_values_states_and_gradients_match_the_golden_file(name, implementation, dtype):
    golden = golden_files.load(name)
    inputs = golden.under("input/")
    bits = "64" if golden.under("output64/") else ""  # one file has float32 results only
    tolerance, d_tolerance = _tolerances(name, dtype, bits)
    case = _case(inputs)
    last = golden.under(f"state{bits}/recurrent/")
    last = cells.MLSTMState(last["c"], last["n"], last["m"].reshape(case.state.m.shape))
    zeros = jax.tree.map(np.zeros_like, case.state)
    weights = {"C": inputs.get("dc", zeros.C), "n": inputs.get("dn", zeros.n), "m": zeros.m}
    cotangents = runs.Cotangents(
        _time_second(inputs["dh"]), zeros, cells.MLSTMState(**weights), np.float64(last.m)
    )
    options = dict(chunk_size=golden.config["chunk_size"], eps=golden.config["eps"])

    result = _run(implementation, case, cotangents, dtype, **options)
    expected = _time_second(golden.arrays[f"output{bits}/h_recurrent"])
    golden_files.assert_matches(result.h, expected, tolerance, "h")
    for leaf, pair in tolerances.with_common_scale(result.state, last).items():
        golden_files.assert_matches(*pair, tolerance, f"state.{leaf}")
    expected_grads = _gradients(golden.under(f"grad{bits}/recurrent/"), case.state)
    golden_files.assert_all_match(result.gradients, expected_grads, d_tolerance)

    h_only = golden.under("grad64_h_only/recurrent/")
    if h_only:
        result = _run(implementation, case, cotangents._replace(state=zeros), dtype, **options)
        expected_grads = _gradients(h_only, case.state)
        golden_files.assert_all_match(result.gradients, expected_grads, d_tolerance)


@dtypes
@every_implementation
@pytest.mark.parametrize("kind", ["normalized", "unnormalized"])
def test_sigmoid_input_gate_matches_the_golden_file(kind, implementation, dtype):
    golden = golden_files.load("mlstm_cell_sigmoid_input_gate")
    inputs = golden.under("input/")
    case = _case(inputs)
    zeros = jax.tree.map(np.zeros_like, case.state)
    cotangents = runs.Cotangents(_time_second(inputs["dh"]), zeros, zeros, zeros.m)
    tolerance, d_tolerance = _tolerances("", dtype, "64")
    variant = {"normalized": "mlstm_sigmoid", "unnormalized": "mlstm_unnormalized"}[kind]
    options = dict(chunk_size=16, eps=golden.config["eps"])
    result = _run(implementation, case, cotangents, dtype, variant, **options)
    expected = _time_second(golden.arrays[f"output64/h_{kind}"])
    golden_files.assert_matches(result.h, expected, tolerance, "h")
    expected_grads = _gradients(golden.under(f"grad64/{kind}/"), case.state)
    golden_files.assert_all_match(result.gradients, expected_grads, d_tolerance)
    assert not result.state.m.any()
