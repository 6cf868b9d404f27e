"""The mLSTM TPU kernels, interpreted: tiles, residuals, uninitialized memory, races, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common
from pallas_kernels.mlstm import backends
from pallas_kernels.mlstm.options import Options
from pallas_kernels.mlstm.tpu_tiles import Tile
from tests import quick
from tests.kernels import mlstm_cases
from tests.kernels.calls import calls
from tests.kernels.mlstm_cases import (
    LANES,
    LEAVES,
    RESET_PATTERNS,
    STRICT,
    assert_results_match,
    in_bfloat16,
    make_case,
    reference,
    with_resets,
)
from tests.ops.tolerances import TABLE, assert_close

# Interpreted kernels are slow; quick cases are in tests/ops and test_quick.py.
pytestmark = pytest.mark.slow

kernel = functools.partial(mlstm_cases.interpret, backends.tpu())
run = functools.partial(mlstm_cases.run, backends.tpu())


@pytest.mark.parametrize("chunk_size,dtype", [(256, "float32"), (128, "bfloat16")])
def test_tiles_of_128_lanes_match_the_recurrence(chunk_size, dtype):
    """A chunk of 256 has two strips of 128; T = 300 is padded to two or three chunks."""
    case = in_bfloat16(make_case(B=1, T=300, K=64, V=128, flags=True))
    actual = kernel(in_bfloat16(case, dtype), lanes=128, chunk_size=chunk_size)
    assert_results_match(actual, reference(case), TABLE[dtype])


TILES = [Tile(8, 8, 4), Tile(16, 16, 2), Tile(32, 8, 1), Tile(64, 32, 1)]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(map(str, tile)))
def test_strips_and_blocks_of_chunks_do_not_affect_results(tile):
    case = make_case(T=64, flags=True)
    assert_results_match(kernel(case, tile=tile), reference(case))


@pytest.mark.parametrize("options", [{}, {"normalize": False}], ids=["normalized", "plain"])
def test_strips_do_not_affect_results_with_sigmoid_input_gate(options):
    case = make_case(T=64)
    options = {"input_gate": "sigmoid", **options}
    assert_results_match(kernel(case, tile=Tile(16, 8, 2), **options), reference(case, **options))


@pytest.mark.parametrize("chunk_size", [8, 32])
@pytest.mark.parametrize("pattern", RESET_PATTERNS)
def test_chunk_size_does_not_affect_results_with_resets(chunk_size, pattern):
    case = with_resets(make_case(T=64, flags=True), pattern, chunk_size)
    assert_results_match(kernel(case, chunk_size=chunk_size), reference(case))


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize("scale", [8.0, 30.0])
def test_large_gates_in_long_chunks_match_the_recurrence(scale, forget_gate):
    case, options = make_case(T=120, scale=scale, flags=True), {"forget_gate": forget_gate}
    actual = kernel(case, tile=Tile(64, 16, 2), **options)
    assert_results_match(actual, reference(case, **options), TABLE["float32, large gates"])


def test_read_out_of_a_state_with_very_negative_m_matches_the_recurrence():
    """m is around or far below `READ_FLOOR`; the input gates are closed, so h nearly vanishes."""
    case = make_case(T=64, flags=True)
    case.state[2][:] = [[-20.0, -25.0], [-22.0, -200.0]]
    case.i[:] -= 250
    case.reset[:] = False
    actual, expected = kernel(case), reference(case)
    assert np.abs(expected["h"]).max() < 1e-6
    assert_close(actual["h"], expected["h"], TABLE["float32"].h, "h")


def test_residual_states_in_bfloat16_round_gradients_but_not_the_final_state():
    """Saved states have the dtype of q; the carry is float32."""
    case = in_bfloat16(make_case(T=64, flags=True))
    expected, float32 = reference(case), kernel(case)
    bfloat16 = kernel(in_bfloat16(case, "bfloat16"))
    assert_results_match(bfloat16, expected, TABLE["bfloat16"])
    for name in LEAVES:  # no rounding here: the operands are bfloat16 already
        assert_close(bfloat16[name], expected[name], TABLE["bfloat16"].state, name)
    errors = [np.abs(results["df"] - expected["df"]).max() for results in (float32, bfloat16)]
    assert errors[0] < 0.1 * errors[1]


def test_residual_states_have_the_dtype_of_q():
    for dtype in map(jnp.dtype, ("float32", "bfloat16")):
        case = jax.tree.map(jnp.asarray, in_bfloat16(make_case(), dtype))
        forward = calls(
            jax.grad(lambda c: run(c)[0].sum().astype("float32"), allow_int=True), case
        )[0]
        C_starts, n_starts = (v.aval.dtype for v in forward.outvars[-2:])
        assert (C_starts, n_starts) == (dtype, jnp.float32)
        assert [v.aval.dtype for v in forward.outvars[1:4]] == [jnp.float32] * 3


def test_forward_kernel_writes_residuals_only_for_a_gradient():
    """Always h and the final state; for a gradient also d and the states at chunk starts."""
    case = jax.tree.map(jnp.asarray, make_case())
    (forward,) = calls(run, case)
    assert [v.aval.ndim for v in forward.outvars] == [3, 4, 4]
    forward, backward = calls(jax.grad(lambda c: run(c)[0].sum(), allow_int=True), case)
    assert [v.aval.ndim for v in forward.outvars] == [3, 4, 4, 4, 5, 5]
    assert forward.params["name"] == "mlstm_forward"
    assert backward.params["name"] == "mlstm_backward"


@pytest.mark.parametrize("interpreter", STRICT.values(), ids=STRICT)
@pytest.mark.parametrize(
    "tile,flags", [(Tile(16, 8, 2), True), (Tile(8, 8, 1), False)], ids=["16-8-2", "8-8-1"]
)
def test_kernels_have_no_uninitialized_reads_or_races(tile, flags, interpreter, capfd):
    case = make_case(B=1, T=61 if tile.chunk > 8 else 21, flags=flags)
    assert_results_match(kernel(case, interpreter=interpreter, tile=tile), reference(case))
    forward = functools.partial(mlstm_cases.run, mlstm_cases.with_tile(backends.tpu(), tile))
    with common.interpreted(interpreter, lanes=LANES):
        h, _ = quick.jit(forward)(jax.tree.map(jnp.asarray, case))
    assert_close(np.asarray(h), reference(case)["h"], TABLE["float32"].h, "h")
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "chunk,advice", [(512, "chunk_size=256"), (384, "chunk_size=128"), (128, "use more heads")]
)
def test_vmem_overflow_message_suggests_a_supported_chunk_size(chunk, advice):
    tile = Tile(chunk, 128, 1)
    options = Options(backends.tpu(), tile, "sigmoid", True, True, 1e-6, False, 128, False)
    assert advice in options.metadata()["if_vmem_overflows"]


@pytest.mark.parametrize("argument", ["gate", "forget gate", "normalizer", "dtypes"])
def test_unsupported_arguments_raise(argument):
    case = jax.tree.map(jnp.asarray, make_case())
    invalid = {"gate": {"input_gate": "relu"}, "normalizer": {"normalize": False}}
    invalid["forget gate"] = {"forget_gate": "relu"}
    options = invalid.get(argument, {})
    if argument == "dtypes":
        case = case._replace(q=case.q.astype(jnp.bfloat16))
    with common.interpreted(lanes=LANES), pytest.raises(ValueError, match="must|needs"):
        run(case, **options)
