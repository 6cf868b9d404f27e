"""The sLSTM TPU kernels, interpreted: blocks, padding, saved gates, decoding, VMEM."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common, tpu
from pallas_kernels.slstm import backends, tpu_tiles
from pallas_kernels.tpu import SCOPED_BYTES
from tests import quick
from tests.kernels import slstm_cases
from tests.kernels.calls import calls
from tests.kernels.mlstm_cases import STRICT
from tests.kernels.slstm_cases import (
    LANES,
    LEAVES,
    Case,
    assert_results_match,
    assert_step_matches_cell,
    in_bfloat16,
    make_case,
    reference,
)
from tests.ops.tolerances import TABLE, assert_close

# Interpreted kernels are slow; quick cases are in tests/ops and test_quick.py.
pytestmark = pytest.mark.slow

STEPS = 4
SMALL_VMEM = tpu_tiles.vmem_bytes(tpu_tiles.SUBLANES, LANES, jnp.dtype("float32"), STEPS)
"""Bytes of VMEM that one head of 8 sequences needs for 4 steps."""

run = functools.partial(slstm_cases.run, backends.tpu())
step = functools.partial(slstm_cases.step, backends.tpu())


def kernel(case: Case, *, vmem=None, **options) -> dict[str, np.ndarray]:
    """h, the final state and all gradients, interpreted, with `vmem` bytes of VMEM."""
    return slstm_cases.interpret(with_vmem(vmem), case, **options)


@functools.cache
def with_vmem(vmem: int | None):
    """The kernels with `vmem` bytes of VMEM; None: the default."""

    def tile(*call):
        with mock.patch.object(tpu_tiles, "vmem_limit", lambda chip=None: vmem):
            return tpu_tiles.choose(*call)

    return backends.tpu() if vmem is None else backends.tpu()._replace(tile=tile)


@pytest.mark.parametrize("T", [1, STEPS, STEPS + 1, 3 * STEPS + 2])
def test_blocks_of_time_do_not_affect_results(T):
    flags = T % STEPS == 2  # lengths that need padding are tested without and with flags
    case = make_case(T=T, flags=flags)
    assert_results_match(kernel(case, vmem=SMALL_VMEM), reference(case))


def test_odd_batch_width_and_head_count_match_recurrence():
    """Two batch blocks, the second padded; three heads in a program each, their width padded."""
    case = make_case(B=11, T=10, H=3, K=6, flags=True)
    assert tpu_tiles.blocks(11, 10, 3, 8, jnp.dtype("float32"), SMALL_VMEM).padded_batch == 16
    assert_results_match(kernel(case, vmem=SMALL_VMEM), reference(case))


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_several_heads_per_program_match_recurrence(flags):
    case = make_case(T=12, H=8, K=6, flags=flags)
    assert tpu_tiles.blocks(2, 12, 8, 8, jnp.dtype("float32"), SCOPED_BYTES).heads == 4
    assert_results_match(kernel(case), reference(case))


def test_narrow_heads_that_share_lanes_match_recurrence():
    """Six heads of width 5: three share the lanes of one wide head without mixing."""
    case = make_case(T=9, H=6, K=5, flags=True)
    assert_results_match(kernel(case, lanes=16), reference(case))


def test_exponential_forget_gate_matches_recurrence():
    case = make_case(flags=True)
    assert_results_match(kernel(case, forget_gate="exp"), reference(case, forget_gate="exp"))


def test_m_is_ignored_where_n_is_zero():
    case = make_case()
    zeros = np.zeros_like(case.state[0])
    case = case._replace(state=(zeros, zeros, zeros, case.state[3] + 50))
    assert_results_match(kernel(case), reference(case))


@pytest.mark.parametrize("scale", [30.0, 1e3])
def test_results_are_finite_and_bounded_at_large_gates(scale):
    results = kernel(make_case(flags=True, scale=scale))
    assert all(np.isfinite(value).all() for value in results.values())
    assert np.abs(results["h"]).max() <= 1 + 1e-6
    assert results["n"].min() >= 1


@pytest.mark.parametrize("save_gates,flags", [(False, True), (True, False)])
def test_saved_and_recomputed_gates_match_recurrence(save_gates, flags):
    case = make_case(flags=flags)
    assert_results_match(kernel(case, save_gates=save_gates), reference(case))


@pytest.mark.parametrize("save_gates,r_dtype", [(False, "bfloat16"), (True, "float32")])
def test_bfloat16_rounds_only_operands(save_gates, r_dtype):
    case = in_bfloat16(make_case(T=24, flags=True))
    bfloat16_case = in_bfloat16(case, "bfloat16", r_dtype)
    actual = kernel(bfloat16_case, save_gates=save_gates)
    assert_results_match(actual, reference(case), TABLE["bfloat16"])


def test_bfloat16_weights_with_float32_inputs_match_recurrence():
    case = make_case()
    case = case._replace(r=jnp.asarray(case.r, jnp.bfloat16))
    actual = kernel(case)
    expected = reference(case._replace(r=np.asarray(case.r, np.float32)))
    rounded = np.asarray(jnp.asarray(expected["dr"], jnp.bfloat16), np.float64)
    assert_close(actual.pop("dr"), rounded, 1e-3, "dr")
    assert_results_match(actual, {name: a for name, a in expected.items() if name != "dr"})


def test_products_with_packed_weights_have_float32_precision(rng):
    a, w = rng.standard_normal((8, 32)), rng.standard_normal((32, 16))
    a, w = (array.astype(np.float32) for array in (a, w))
    multiply = jax.jit(lambda a, w: tpu.packed_matmul(a, tpu.pack_weights(w[None])[0]))
    product = np.asarray(multiply(a, w))
    expected = a.astype(np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(product, expected, rtol=0, atol=3e-7 * np.abs(expected).max())


def test_results_are_bit_identical_without_the_other_sequences():
    """A batch of 3 sequences, padded to 8, against a batch of 8 that contains them."""
    case = make_case(B=8, flags=True)
    first_three = jax.tree.map(lambda a: a[:3], case)._replace(r=case.r, b=case.b)
    eight, three = kernel(case), kernel(first_three)
    for name in eight.keys() - {"dr", "db"}:
        np.testing.assert_array_equal(three[name], eight[name][:3], err_msg=name)


def test_padded_lanes_do_not_affect_results():
    case = make_case(K=6, flags=True)
    assert_results_match(kernel(case, lanes=32), kernel(case, lanes=6))


@pytest.mark.parametrize("save_gates", [False, True], ids=["recomputed", "saved"])
def test_masked_steps_are_not_read_and_leave_the_state_bit_identical(save_gates):
    run = functools.partial(kernel, save_gates=save_gates)
    case = make_case(flags=True)
    garbage = case.x.copy()
    garbage[~case.mask] = np.nan
    clean, dirty = run(case), run(case._replace(x=garbage, reset=case.reset | ~case.mask))
    for name, value in clean.items():
        np.testing.assert_array_equal(dirty[name], value, err_msg=name)
    assert not clean["h"][~case.mask].any() and not clean["dx"][~case.mask].any()
    all_masked = run(case._replace(x=garbage, mask=np.zeros_like(case.mask)))
    for name, leaf in zip(LEAVES, case.state, strict=True):
        if name != "h":
            np.testing.assert_array_equal(all_masked[name], leaf, err_msg=name)
    assert not all_masked["dr"].any()
    for name, leaf in zip(LEAVES, case.dstate, strict=True):
        assert_close(all_masked[f"d{name}"], leaf.astype(np.float64), 1e-6, f"d{name}")


def test_reset_discards_a_nan_state():
    """No gradient reaches it either, not even through m, which rescales c and n."""
    case = make_case()
    reset = np.zeros(case.x.shape[:2], bool)
    reset[:, 0] = True
    case = case._replace(reset=reset)
    nan_case = case._replace(state=tuple(np.full_like(leaf, np.nan) for leaf in case.state))
    expected, actual = kernel(case), kernel(nan_case)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
    assert not any(actual[f"d{name}"].any() for name in LEAVES)


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_decoding_matches_the_cell(forget_gate, flags):
    case = make_case(B=3, T=1, H=3, K=6, flags=flags)
    if flags:
        case = case._replace(reset=np.array([[True], [False], [True]]))
        case = case._replace(mask=np.array([[True], [True], [False]]))
        case.x[2] = np.nan
    assert_step_matches_cell(case, step(case, forget_gate=forget_gate), forget_gate=forget_gate)


def test_decoding_updates_the_state_in_place():
    """Each leaf of the state is passed unchanged and shares its buffer with an output."""
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    (call,) = calls(run, case)
    assert dict(call.params["input_output_aliases"]) == {3: 0, 4: 1, 5: 2, 6: 3}


def test_one_step_uses_the_decode_kernel_unless_differentiated():
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    names = lambda function: [call.params["name"] for call in calls(function, case)]  # noqa: E731
    assert names(run) == ["slstm_decode"]
    assert names(jax.grad(lambda c: run(c)[0].sum())) == ["slstm_forward", "slstm_backward"]


def test_forward_without_gradient_writes_only_h_and_the_state():
    case = jax.tree.map(jnp.asarray, make_case())
    (call,) = calls(run, case)
    assert len(call.outvars) == 2


@pytest.mark.parametrize("batched", ["x", "everything"])
@pytest.mark.parametrize("T", [1, 9])
def test_vmap_matches_a_loop(T, batched):
    cases = [make_case(T=T, flags=True, seed=seed) for seed in range(2)]
    if batched == "x":
        cases = [cases[0]._replace(x=case.x) for case in cases]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    axes = jax.tree.map(lambda _: 0, stacked)
    if batched == "x":
        axes = jax.tree.map(lambda _: None, axes)._replace(x=0)
        stacked = jax.tree.map(jnp.asarray, cases[0])._replace(x=stacked.x)

    kernels = with_vmem(SMALL_VMEM)

    def evaluate(case):
        with_gradients = slstm_cases.value_and_gradients(kernels, case)
        return slstm_cases.run(kernels, case), with_gradients

    with common.interpreted(lanes=LANES):
        actual = quick.jit(jax.vmap(evaluate, in_axes=(axes,)))(stacked)
        by_loop = [quick.jit(evaluate)(jax.tree.map(jnp.asarray, case)) for case in cases]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *by_loop)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected
    )


def error_message(case: Case, kernels=None, **options) -> str:
    """The message of the `ValueError` that a call raises."""
    arguments = jax.tree.map(jnp.asarray, case)
    with common.interpreted(lanes=LANES), pytest.raises(ValueError) as error:
        slstm_cases.run(kernels or backends.tpu(), arguments, **options)
    return str(error.value)


def test_unsupported_arguments_raise():
    case = make_case()
    assert "use bfloat16 or float32" in error_message(case._replace(x=case.x.astype(np.float16)))
    assert "'sigmoid' or 'exp', got 'tanh'" in error_message(case, forget_gate="tanh")
    assert "`r` must have the shape (2, 8, 4, 8)" in error_message(case._replace(r=case.r[:1]))
    narrow = (*case.state[:3], case.state[3][..., :4])
    assert "`state.m` must have the shape (2, 2, 8)" in error_message(case._replace(state=narrow))


def test_width_suggested_by_an_error_fits():
    with common.interpreted(lanes=LANES):
        widest = tpu_tiles.widest(jnp.dtype("float32"), SMALL_VMEM)
    message = f"MiB of VMEM; K={widest} fits: use more heads."
    assert message in error_message(make_case(T=2, K=widest + 1), with_vmem(SMALL_VMEM))
    for dtype in map(jnp.dtype, ("float32", "bfloat16")):
        widest = tpu_tiles.widest(dtype, SCOPED_BYTES)
        assert tpu_tiles.blocks(8, 64, 4, widest, dtype, SCOPED_BYTES) is not None
        assert tpu_tiles.blocks(8, 64, 4, widest + 128, dtype, SCOPED_BYTES) is None


def test_one_step_uses_the_sequence_kernel_if_the_state_exceeds_vmem():
    case = jax.tree.map(jnp.asarray, make_case(B=200, T=1))
    compute = functools.partial(slstm_cases.run, with_vmem(SMALL_VMEM))
    assert [call.params["name"] for call in calls(compute, case)] == ["slstm_forward"]


@pytest.mark.parametrize("T", [1, 31, 32, 61, 64, 96, 97, 1000, 1023])
@pytest.mark.parametrize("max_steps", [1, 5, 12, 100])
def test_a_time_block_is_at_most_max_steps_and_needs_little_padding(T, max_steps):
    steps = tpu_tiles.time_block(T, max_steps)
    assert 1 <= steps <= min(max_steps, tpu_tiles.MAX_STEPS)
    assert common.round_up(T, steps) - T <= max(2 * -(-T // steps), 0)


@pytest.mark.parametrize("B", [1, 20, 100, 700])
@pytest.mark.parametrize("K", [128, 256, 512, 768])
def test_blocks_fit_vmem_and_cover_the_call(B, K):
    dtype, H, T = jnp.dtype("bfloat16"), 8, 50
    blocks = tpu_tiles.blocks(B, T, H, K, dtype, SCOPED_BYTES)
    needed = tpu_tiles.vmem_bytes(blocks.sequences, K, dtype, blocks.steps, heads=blocks.heads)
    assert needed <= SCOPED_BYTES
    assert blocks.padded_batch >= B and blocks.padded_batch % blocks.sequences == 0
    assert blocks.sequences % tpu_tiles.SUBLANES == 0
    assert blocks.padded_steps >= T and blocks.padded_steps % blocks.steps == 0 == H % blocks.heads


@pytest.mark.parametrize("interpreter", STRICT.values(), ids=STRICT)
@pytest.mark.parametrize("T", [1, 9])
def test_no_uninitialized_memory_is_read_and_no_race_occurs(interpreter, T, capfd):
    case = make_case(T=T, flags=True)
    assert_results_match(kernel(case, interpreter=interpreter, vmem=SMALL_VMEM), reference(case))
    with common.interpreted(interpreter, lanes=LANES):
        h, _ = quick.jit(run)(jax.tree.map(jnp.asarray, case._replace(reset=None, mask=None)))
    assert np.isfinite(h).all()
    assert "RACE DETECTED" not in capfd.readouterr().out
