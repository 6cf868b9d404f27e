"""The sLSTM and the LSTM against golden files: every implementation, and the cell."""

import jax
import numpy as np
import pytest

from tests import golden_files
from tests.ops import runs, tolerances
from tests.ops.subjects import Case, Subject, implementations
from xlstm_jax import cells

NAMES = golden_files.names("slstm_cell_*")
LEAVES = {"slstm": ("h", "c", "n", "m"), "lstm": ("h", "c")}  # their order in a file
STATES = {"slstm": cells.SLSTMState, "lstm": cells.LSTMState}


def _implementations():
    for name in NAMES:
        op = golden_files.load(name).config["function"]
        for implementation in [*implementations(op), "cell"]:
            # The only implementation of the LSTM is the scan of its cell.
            marks = [pytest.mark.slow] if (op, implementation) == ("lstm", "cell") else []
            yield pytest.param(name, implementation, marks=marks)


def _gates(x: np.ndarray, num_heads: int) -> np.ndarray:
    """`B T (4 H K)` to `B T 4 H K`."""
    return x.reshape(x.shape[:2] + (4, num_heads, -1)).astype(np.float64)


def _recurrent(x: np.ndarray) -> np.ndarray:
    """`H (4 K_out) K_in` to `H K_in 4 K_out`."""
    H, _, K = x.shape
    return x.reshape(H, 4, K, K).transpose(0, 3, 1, 2).astype(np.float64)


def _bias(x: np.ndarray, num_heads: int) -> np.ndarray:
    """`(4 H K)` to `H 4 K`."""
    return x.reshape(4, num_heads, -1).transpose(1, 0, 2).astype(np.float64)


def _state(op: str, x: np.ndarray, num_heads: int):
    """Leaves stacked on the first axis, `B (H K)` each, to a state."""
    leaves = dict(zip(LEAVES[op], x, strict=True))
    leaves = {k: a.reshape(a.shape[0], num_heads, -1).astype(np.float64) for k, a in leaves.items()}
    return STATES[op](**leaves)


def _gradients(op: str, arrays: dict[str, np.ndarray], num_heads: int) -> dict[str, np.ndarray]:
    """Gradients of a golden file, by our argument names and in our layout."""
    gradients = {
        "x": _gates(arrays["x"], num_heads),
        "r": _recurrent(arrays["_recurrent_kernel_"]),
        "b": _bias(arrays["_bias_"], num_heads),
    }
    if "state" in arrays:
        leaves = _state(op, arrays["state"], num_heads)._asdict()
        gradients |= {f"state.{name}": leaf for name, leaf in leaves.items()}
    return gradients


@pytest.mark.parametrize("name", NAMES)
def test_both_parameter_layouts_of_a_golden_file_agree(name):
    golden = golden_files.load(name)
    H = golden.config["num_heads"]
    r, b = (golden.arrays[f"param/{key}"] for key in ("_recurrent_kernel_", "_bias_"))
    np.testing.assert_array_equal(_recurrent(r), golden.arrays["param_ext/recurrent_kernel"])
    np.testing.assert_array_equal(_bias(b, H), golden.arrays["param_ext/bias"])


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name,implementation", list(_implementations()))
def test_values_states_and_gradients_match_the_golden_file(name, implementation, dtype):
    golden = golden_files.load(name)
    op, H = golden.config["function"], golden.config["num_heads"]
    refusal = implementations(op).get(implementation)
    if refusal is not None:
        pytest.skip(refusal)
    tolerance, d_tolerance = (1e-10, 1e-10) if dtype == "float64" else (2e-5, 2e-4)
    inputs = golden.under("input/")
    stacked = inputs.get("state", np.zeros_like(inputs["dstate_final"]))
    weights = {
        "r": golden.arrays["param_ext/recurrent_kernel"].astype(np.float64),
        "b": golden.arrays["param_ext/bias"].astype(np.float64),
    }
    case = Case({"x": _gates(inputs["x"], H)}, weights, _state(op, stacked, H))
    last = _state(op, golden.arrays["state64/final"], H)
    zeros = jax.tree.map(np.zeros_like, case.state)
    dh = np.swapaxes(inputs["dh"], 1, 2).astype(np.float64)
    cotangents = runs.Cotangents(dh, zeros, zeros, getattr(last, "m", None))
    subject = Subject(op, "reference" if implementation == "cell" else implementation)

    result = runs.run(subject, case, cotangents, dtype)
    expected = np.swapaxes(golden.arrays["output64/h"], 1, 2)
    golden_files.assert_matches(result.h, expected, tolerance, "h")
    for leaf, pair in tolerances.with_common_scale(result.state, last).items():
        golden_files.assert_matches(*pair, tolerance, f"state.{leaf}")
    expected_grads = _gradients(op, golden.under("grad64_h_only/"), H)
    if name == "slstm_cell_partial_zero_n":
        # The other implementation applies the first-step rule to the entire array, ours to each
        # element: the state of an element with n = 0 then has no effect.
        is_initial = case.state.n == 0
        for leaf in ("c", "n", "m"):
            assert not result.gradients[f"state.{leaf}"][is_initial].any()
            expected_grads[f"state.{leaf}"] = np.where(
                is_initial, 0, expected_grads[f"state.{leaf}"]
            )
    golden_files.assert_all_match(result.gradients, expected_grads, d_tolerance)
    if name != "slstm_cell_partial_zero_n":  # its final state differs, by the same rule
        loss = cotangents._replace(state=_state(op, inputs["dstate_final"], H))
        result = runs.run(subject, case, loss, dtype)
        expected_grads = _gradients(op, golden.under("grad64/"), H)
        golden_files.assert_all_match(result.gradients, expected_grads, d_tolerance)
