"""The mLSTM Mosaic GPU kernels, interpreted with race detection, against the float64 recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common, mosaic
from pallas_kernels.mlstm import backends
from tests.kernels import mlstm_cases
from tests.kernels.mlstm_cases import (
    INPUTS,
    LEAVES,
    RESET_PATTERNS,
    assert_results_match,
    in_bfloat16,
    make_case,
    reference,
    with_resets,
)
from tests.ops.tolerances import TABLE, assert_close
from xlstm_jax import ops

with common.interpreted():
    REFUSAL = mosaic.refusal()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]
if REFUSAL is None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.mlstm import mosaic_calls
    from pallas_kernels.mlstm.mosaic_tiles import Outputs, States, Tile

    STRICT = plgpu.InterpretGPUParams(detect_races=True)  # and NaN in uninitialized memory

TOLERANCE = TABLE["bfloat16"]


def assert_matches(actual, case, **options):
    """h, the final state and all gradients are those of the recurrence.

    dm is one number per head, the sum of dC * C, and may be small; its error is that of the terms.
    """
    expected = reference(case, **options)
    terms = expected["dC"] * np.asarray(case.state[0], np.float64)
    error = np.abs(actual["dm"] - expected["dm"]).max()
    assert error <= TOLERANCE.d_gates * np.sqrt(np.square(terms).sum((2, 3))).max()
    assert_results_match(actual | {"dm": expected["dm"]}, expected, TOLERANCE)


def kernel(case, *, chunk_size=128, **options) -> dict[str, np.ndarray]:
    """h, the final state and all gradients by the kernels, interpreted, in bfloat16."""
    options["chunk_size"] = chunk_size
    case = in_bfloat16(case, "bfloat16")
    return mlstm_cases.interpret(backends.mosaic_gpu(), case, interpreter=STRICT, **options)


def rounded(**options):
    """A case whose inputs are exact in bfloat16; two chunks of 128, one of them padded."""
    return in_bfloat16(make_case(**{"B": 1, "T": 200, "H": 1, "K": 40, "V": 70} | options))


def tile(groups, blocks, inner, slots, *, state_groups=1, state_blocks=1, chunk=128) -> "Tile":
    """A tile for heads of 128 and 128."""
    outputs = Outputs(groups, blocks, inner, slots)
    return Tile(chunk, States(state_groups, state_blocks, slots), outputs, outputs)


TILES = {
    "one warp group": (1, 1, 1, 2),
    "two warp groups": (2, 1, 1, 2),
    "two blocks of columns": (2, 2, 1, 4),
    "two blocks in a slot": (1, 1, 2, 2),
    "everything": (2, 2, 2, 2),
}


@pytest.mark.parametrize("blocks", TILES.values(), ids=TILES)
def test_block_sizes_do_not_affect_results(blocks):
    case = rounded(K=128, V=128, flags=True)
    sizes = dict(state_groups=blocks[0], state_blocks=blocks[1])
    assert_matches(kernel(case, tile=tile(*blocks, **sizes)), case)


@pytest.mark.parametrize("T", [1, 64, 129])
def test_any_length_matches_recurrence(T):
    case = rounded(T=T, flags=T != 64)
    assert_matches(kernel(case, chunk_size=64), case)


@pytest.mark.parametrize("K,V", [(1, 3), (64, 192), (192, 64)])
def test_any_width_matches_recurrence(K, V):
    case = rounded(T=70, K=K, V=V)
    assert_matches(kernel(case), case)


def test_batches_and_heads_match_recurrence():
    case = rounded(B=2, T=66, H=3, flags=True)
    assert_matches(kernel(case, chunk_size=64), case)


@pytest.mark.parametrize("pattern", RESET_PATTERNS)
def test_resets_match_recurrence(pattern):
    case = with_resets(rounded(flags=True), pattern, 128)
    assert_matches(kernel(case), case)


@pytest.mark.parametrize(
    "options",
    [
        {"input_gate": "sigmoid"},
        {"input_gate": "sigmoid", "normalize": False},
        {"input_gate": "sigmoid", "eps": 0.5},
        {"forget_gate": "exp"},
    ],
    ids=str,
)
def test_gates_and_normalizers_match_recurrence(options):
    case = rounded(flags=True)
    if "forget_gate" in options:  # otherwise the state grows by e^3 at every step
        case = in_bfloat16(case._replace(f=case.f - 4.0))
    assert_matches(kernel(case, **options), case, **options)


def test_large_gates_match_recurrence():
    case = rounded(scale=8.0, flags=True)
    actual, expected = kernel(case), reference(case)
    assert_close(actual["h"], expected["h"], TOLERANCE.h, "h")
    for name in LEAVES:
        assert_close(actual[name], expected[name], TOLERANCE.state, name)


def test_masked_steps_are_not_read():
    case = rounded(flags=True)
    dirty = {name: np.array(getattr(case, name)) for name in INPUTS}
    for array in dirty.values():
        array[~case.mask] = np.nan
    expected, actual = kernel(case), kernel(case._replace(**dirty))
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def test_fully_masked_sequence_leaves_the_state_bit_identical():
    case = rounded(T=70, flags=True)
    case.mask[:] = False
    actual = kernel(case)
    for name, leaf in zip(LEAVES, case.state, strict=True):
        np.testing.assert_array_equal(actual[name], leaf, err_msg=name)


def test_final_n_is_as_exact_as_in_float32():
    """Its weights are the sum of three numbers in bfloat16."""
    case = rounded(flags=True)
    assert_close(kernel(case)["n"], reference(case)["n"], 1e-6, "n")


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_split_is_exact(scale):
    x = scale * np.random.default_rng(0).standard_normal((3, 1, 50)).astype(np.float32)
    parts = jax.jit(mosaic_calls.split)(jnp.asarray(x))
    assert parts.shape == (3, 8, 50) and parts.dtype == jnp.bfloat16
    total = np.asarray(parts, np.float64).sum(1, keepdims=True)
    np.testing.assert_allclose(total, x, rtol=2.0**-23)


def test_vmap_matches_separate_calls():
    cases = [rounded(T=70, seed=seed) for seed in (0, 1)]
    run = functools.partial(mlstm_cases.run, backends.mosaic_gpu(), chunk_size=64)
    cases = [jax.tree.map(jnp.asarray, in_bfloat16(case, "bfloat16")) for case in cases]
    with common.interpreted():
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
        together = jax.jit(jax.vmap(run))(stacked)
        alone = [jax.jit(run)(case) for case in cases]
    for i, expected in enumerate(alone):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(a[i], np.float32), np.asarray(b, np.float32))


def test_op_runs_the_named_kernels():
    case = jax.tree.map(jnp.asarray, in_bfloat16(rounded(T=70), "bfloat16"))
    with common.interpreted():
        h, _ = jax.jit(functools.partial(ops.mlstm, implementation="mosaic_gpu"))(*case[:5])
    expected, _ = ops.mlstm(*case[:5], implementation="recurrent")
    assert_close(np.asarray(h, np.float64), np.asarray(expected, np.float64), TOLERANCE.h, "h")
