"""The mLSTM against golden vectors: every implementation, and the cell itself."""

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

# `recurrent` is the scan of the cell, so the cell on its own need not be quick; `parallel` is one
# program for any gates, so the files differ little to it.
every_way = pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=[pytest.mark.slow] if way in ("parallel", "cell") else [])
        for way in [*implementations("mlstm"), "cell"]
    ],
)
dtypes = pytest.mark.parametrize(
    "dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)]
)


def _time_second(x: np.ndarray) -> np.ndarray:
    """`B H T ...` of the files to our `B T H ...`."""
    return np.swapaxes(x, 1, 2).astype(np.float64)


def _initial(given: dict[str, np.ndarray]) -> cells.MLSTMState:
    B, H, _, K = given["q"].shape
    V = given["v"].shape[-1]
    shapes = {"C": (B, H, K, V), "n": (B, H, K), "m": (B, H)}
    leaves = {
        leaf: given.get(f"{key}_initial", np.zeros(shapes[leaf])).reshape(shapes[leaf])
        for leaf, key in KEYS.items()
    }
    return jax.tree.map(np.float64, cells.MLSTMState(**leaves))


def _case(given: dict[str, np.ndarray]) -> Case:
    return Case({name: _time_second(given[name]) for name in "qkvif"}, {}, _initial(given))


def _run(way, case, cotangents, dtype, variant="mlstm", **options):
    refusal = implementations("mlstm").get(way)
    if refusal is not None:
        pytest.skip(refusal)
    if way == "cell":
        options.pop("chunk_size")
    subject = Subject(variant, "truth" if way == "cell" else way)
    if subject.is_kernel:
        options["chunk_size"] = common.round_up(options["chunk_size"], L)
    return runs.run(subject, case, cotangents, dtype, **options)


def _gradients(found: dict[str, np.ndarray], like: cells.MLSTMState) -> dict[str, np.ndarray]:
    """Gradients of a file by our argument names and in our layout."""
    gradients = {name: _time_second(found[name]) for name in "qkvif"}
    for leaf, key in KEYS.items():
        if f"{key}_initial" in found:
            shape = getattr(like, leaf).shape
            gradients[f"state.{leaf}"] = found[f"{key}_initial"].reshape(shape)
    return gradients


def _tolerances(name: str, dtype: str, bits: str) -> tuple[float, float]:
    if name in LARGE_GATES and dtype == "float32":
        return 1e-3, 2e-3
    return (1e-10, 1e-10) if dtype == "float64" and bits == "64" else (2e-5, 2e-4)


@dtypes
@every_way
@pytest.mark.parametrize("name", NAMES)
def test_values_states_and_gradients_equal_the_golden_file(name, way, dtype):
    golden = golden_files.load(name)
    given = golden.under("input/")
    bits = "64" if golden.under("output64/") else ""  # one file has float32 results alone
    tolerance, d_tolerance = _tolerances(name, dtype, bits)
    case = _case(given)
    last = golden.under(f"state{bits}/recurrent/")
    last = cells.MLSTMState(last["c"], last["n"], last["m"].reshape(case.state.m.shape))
    zeros = jax.tree.map(np.zeros_like, case.state)
    weights = {"C": given.get("dc", zeros.C), "n": given.get("dn", zeros.n), "m": zeros.m}
    cotangents = runs.Cotangents(
        _time_second(given["dh"]), zeros, cells.MLSTMState(**weights), np.float64(last.m)
    )
    options = dict(chunk_size=golden.config["chunk_size"], eps=golden.config["eps"])

    result = _run(way, case, cotangents, dtype, **options)
    expected = _time_second(golden.arrays[f"output{bits}/h_recurrent"])
    golden_files.assert_matches(result.h, expected, tolerance, "h")
    for leaf, pair in tolerances.on_one_scale(result.state, last).items():
        golden_files.assert_matches(*pair, tolerance, f"state.{leaf}")
    found = _gradients(golden.under(f"grad{bits}/recurrent/"), case.state)
    golden_files.assert_all_match(result.gradients, found, d_tolerance)

    h_only = golden.under("grad64_h_only/recurrent/")
    if h_only:
        result = _run(way, case, cotangents._replace(state=zeros), dtype, **options)
        found = _gradients(h_only, case.state)
        golden_files.assert_all_match(result.gradients, found, d_tolerance)


@dtypes
@every_way
@pytest.mark.parametrize("kind", ["normalized", "unnormalized"])
def test_the_sigmoid_input_gate_equals_the_golden_file(kind, way, dtype):
    golden = golden_files.load("mlstm_cell_sigmoid_input_gate")
    given = golden.under("input/")
    case = _case(given)
    zeros = jax.tree.map(np.zeros_like, case.state)
    cotangents = runs.Cotangents(_time_second(given["dh"]), zeros, zeros, zeros.m)
    tolerance, d_tolerance = _tolerances("", dtype, "64")
    variant = {"normalized": "mlstm_sigmoid", "unnormalized": "mlstm_unnormalized"}[kind]
    options = dict(chunk_size=16, eps=golden.config["eps"])
    result = _run(way, case, cotangents, dtype, variant, **options)
    expected = _time_second(golden.arrays[f"output64/h_{kind}"])
    golden_files.assert_matches(result.h, expected, tolerance, "h")
    found = _gradients(golden.under(f"grad64/{kind}/"), case.state)
    golden_files.assert_all_match(result.gradients, found, d_tolerance)
    assert not result.state.m.any()
