"""What is particular to the sLSTM's TPU kernels: blocks, padding, saved gates, decoding."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import common, tpu
from pallas_kernels.slstm import backends, tpu_tiles
from pallas_kernels.tpu import SCOPED_BYTES
from tests import quick
from tests.kernels import slstm_cases
from tests.kernels.calls import calls
from tests.kernels.slstm_cases import (
    LANES,
    LEAVES,
    Case,
    assert_equal_results,
    assert_step_equals_the_cell,
    in_bfloat16,
    make_case,
    truth,
)
from tests.ops.tolerances import TABLE, assert_close

# Interpreted kernels: once is enough. Quick ones are in tests/ops and test_quick.py.
pytestmark = pytest.mark.slow

STEPS = 4
SMALL = tpu_tiles.vmem_bytes(tpu_tiles.ROWS, LANES, jnp.dtype("float32"), STEPS)
"""Bytes of VMEM in which one head of 8 sequences has room for 4 steps."""

run = functools.partial(slstm_cases.run, backends.tpu())
step = functools.partial(slstm_cases.step, backends.tpu())


def kernel(case: Case, *, vmem=None, **options) -> dict[str, np.ndarray]:
    """Everything by the kernels, interpreted; `vmem`: the bytes that they may use."""
    return slstm_cases.interpret(within(vmem), case, **options)


@functools.cache
def within(vmem: int | None):
    """The kernels with so many bytes of VMEM."""

    def tile(*call):
        with mock.patch.object(tpu_tiles, "vmem_limit", lambda chip=None: vmem):
            return tpu_tiles.choose(*call)

    return backends.tpu() if vmem is None else backends.tpu()._replace(tile=tile)


@pytest.mark.parametrize("T", [1, STEPS, STEPS + 1, 3 * STEPS + 2])
def test_blocks_of_time_do_not_show(T):
    flags = T % STEPS == 2  # a number of steps without, one with, that has to be padded
    case = make_case(T=T, flags=flags)
    assert_equal_results(kernel(case, vmem=SMALL), truth(case))


def test_any_batch_width_and_number_of_heads_equals_the_recurrence():
    """Two blocks of rows, the second padded; three heads one by one, their width padded."""
    case = make_case(B=11, T=10, H=3, K=6, flags=True)
    assert tpu_tiles.blocks(11, 10, 3, 8, jnp.dtype("float32"), SMALL).num_rows == 16
    assert_equal_results(kernel(case, vmem=SMALL), truth(case))


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_several_heads_of_one_program_equal_the_recurrence(flags):
    case = make_case(T=12, H=8, K=6, flags=flags)
    assert tpu_tiles.blocks(2, 12, 8, 8, jnp.dtype("float32"), SCOPED_BYTES).heads == 4
    assert_equal_results(kernel(case), truth(case))


def test_narrow_heads_side_by_side_equal_the_recurrence():
    """Six heads of width 5: three share the lanes of one wide head and do not mix."""
    case = make_case(T=9, H=6, K=5, flags=True)
    assert_equal_results(kernel(case, lanes=16), truth(case))


def test_the_exponential_forget_gate_equals_the_recurrence():
    case = make_case(flags=True)
    assert_equal_results(kernel(case, forget_gate="exp"), truth(case, forget_gate="exp"))


def test_an_empty_memory_takes_the_first_input_whatever_m_is():
    case = make_case()
    zeros = np.zeros_like(case.state[0])
    case = case._replace(state=(zeros, zeros, zeros, case.state[3] + 50))
    assert_equal_results(kernel(case), truth(case))


@pytest.mark.parametrize("scale", [30.0, 1e3])
def test_large_gates_keep_everything_finite_and_bounded(scale):
    result = kernel(make_case(flags=True, scale=scale))
    assert all(np.isfinite(value).all() for value in result.values())
    assert np.abs(result["h"]).max() <= 1 + 1e-6
    assert result["n"].min() >= 1


@pytest.mark.parametrize("save_gates,flags", [(False, True), (True, False)])
def test_gates_may_be_saved_or_recomputed(save_gates, flags):
    case = make_case(flags=flags)
    assert_equal_results(kernel(case, save_gates=save_gates), truth(case))


@pytest.mark.parametrize("save_gates,r_dtype", [(False, "bfloat16"), (True, "float32")])
def test_bfloat16_rounds_operands_only(save_gates, r_dtype):
    case = in_bfloat16(make_case(T=24, flags=True))
    given = in_bfloat16(case, "bfloat16", r_dtype)
    assert_equal_results(kernel(given, save_gates=save_gates), truth(case), TABLE["bfloat16"])


def test_weights_of_bfloat16_serve_float32_inputs():
    case = make_case()
    case = case._replace(r=jnp.asarray(case.r, jnp.bfloat16))
    result = kernel(case)
    expected = truth(case._replace(r=np.asarray(case.r, np.float32)))
    rounded = np.asarray(jnp.asarray(expected["dr"], jnp.bfloat16), np.float64)
    assert_close(result.pop("dr"), rounded, 1e-3, "dr")
    assert_equal_results(result, {name: a for name, a in expected.items() if name != "dr"})


def test_products_with_packed_weights_keep_the_digits_of_float32(rng):
    a, w = rng.standard_normal((8, 32)), rng.standard_normal((32, 16))
    a, w = (array.astype(np.float32) for array in (a, w))
    multiply = jax.jit(lambda a, w: tpu.packed_matmul(a, tpu.pack_weights(w[None])[0]))
    product = np.asarray(multiply(a, w))
    expected = a.astype(np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(product, expected, rtol=0, atol=3e-7 * np.abs(expected).max())


def test_padded_sequences_change_no_bit_of_the_others():
    """A batch of 3 beside the same batch with five more sequences."""
    case = make_case(B=8, flags=True)
    cut = jax.tree.map(lambda a: a[:3], case)._replace(r=case.r, b=case.b)
    eight, three = kernel(case), kernel(cut)
    for name in eight.keys() - {"dr", "db"}:
        np.testing.assert_array_equal(three[name], eight[name][:3], err_msg=name)


def test_padded_lanes_change_nothing():
    case = make_case(K=6, flags=True)
    assert_equal_results(kernel(case, lanes=32), kernel(case, lanes=6))


@pytest.mark.parametrize("save_gates", [False, True], ids=["computed", "saved"])
def test_a_masked_step_is_never_read_and_leaves_the_state_bit_for_bit(save_gates):
    run = functools.partial(kernel, save_gates=save_gates)
    case = make_case(flags=True)
    garbage = case.x.copy()
    garbage[~case.mask] = np.nan
    clean, dirty = run(case), run(case._replace(x=garbage, reset=case.reset | ~case.mask))
    for name, value in clean.items():
        np.testing.assert_array_equal(dirty[name], value, err_msg=name)
    assert not clean["h"][~case.mask].any() and not clean["dx"][~case.mask].any()
    asleep = run(case._replace(x=garbage, mask=np.zeros_like(case.mask)))
    for name, leaf in zip(LEAVES, case.state, strict=True):
        if name != "h":
            np.testing.assert_array_equal(asleep[name], leaf, err_msg=name)
    assert not asleep["dr"].any()
    for name, leaf in zip(LEAVES, case.dstate, strict=True):
        assert_close(asleep[f"d{name}"], leaf.astype(np.float64), 1e-6, f"d{name}")


def test_a_reset_leaves_no_trace_of_a_spoilt_memory():
    """Nor does any gradient reach it, not even that of m, which moves all of the memory."""
    case = make_case()
    reset = np.zeros(case.x.shape[:2], bool)
    reset[:, 0] = True
    case = case._replace(reset=reset)
    spoilt = case._replace(state=tuple(np.full_like(leaf, np.nan) for leaf in case.state))
    clean, found = kernel(case), kernel(spoilt)
    for name, value in clean.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert not any(found[f"d{name}"].any() for name in LEAVES)


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_decoding_equals_the_step_of_the_cell(forget_gate, flags):
    case = make_case(B=3, T=1, H=3, K=6, flags=flags)
    if flags:
        case = case._replace(reset=np.array([[True], [False], [True]]))
        case = case._replace(mask=np.array([[True], [True], [False]]))
        case.x[2] = np.nan
    found = step(case, forget_gate=forget_gate)
    assert_step_equals_the_cell(case, found, forget_gate=forget_gate)


def test_decoding_writes_the_state_in_place():
    """Each leaf of the state goes to the kernel as it is and shares its buffer with an output."""
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    (call,) = calls(run, case)
    assert dict(call.params["input_output_aliases"]) == {3: 0, 4: 1, 5: 2, 6: 3}


def test_one_step_decodes_unless_it_is_differentiated():
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    names = lambda function: [call.params["name"] for call in calls(function, case)]  # noqa: E731
    assert names(run) == ["slstm_decode"]
    assert names(jax.grad(lambda c: run(c)[0].sum())) == ["slstm_forward", "slstm_backward"]


def test_without_a_gradient_only_h_and_the_state_are_written():
    case = jax.tree.map(jnp.asarray, make_case())
    (call,) = calls(run, case)
    assert len(call.outvars) == 2


@pytest.mark.parametrize("batched", ["x", "everything"])
@pytest.mark.parametrize("T", [1, 9])
def test_vmap_equals_a_loop(T, batched):
    cases = [make_case(T=T, flags=True, seed=seed) for seed in range(2)]
    if batched == "x":
        cases = [cases[0]._replace(x=case.x) for case in cases]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    axes = jax.tree.map(lambda _: 0, stacked)
    if batched == "x":
        axes = jax.tree.map(lambda _: None, axes)._replace(x=0)
        stacked = jax.tree.map(jnp.asarray, cases[0])._replace(x=stacked.x)

    kernels = within(SMALL)

    def evaluate(case):
        both = slstm_cases.value_and_gradients(kernels, case)
        return slstm_cases.run(kernels, case), both

    with common.interpreted(lanes=LANES):
        together = quick.jit(jax.vmap(evaluate, in_axes=(axes,)))(stacked)
        alone = [quick.jit(evaluate)(jax.tree.map(jnp.asarray, case)) for case in cases]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), together, expected
    )


def refusal(case: Case, kernels=None, **options) -> str:
    arguments = jax.tree.map(jnp.asarray, case)
    with common.interpreted(lanes=LANES), pytest.raises(ValueError) as error:
        slstm_cases.run(kernels or backends.tpu(), arguments, **options)
    return str(error.value)


def test_what_no_kernel_computes_is_refused():
    case = make_case()
    assert "use bfloat16 or float32" in refusal(case._replace(x=case.x.astype(np.float16)))
    assert "'sigmoid' or 'exp', got 'tanh'" in refusal(case, forget_gate="tanh")
    assert "`r` must have the shape (2, 8, 4, 8)" in refusal(case._replace(r=case.r[:1]))
    narrow = (*case.state[:3], case.state[3][..., :4])
    assert "`state.m` must have the shape (2, 2, 8)" in refusal(case._replace(state=narrow))


def test_the_width_that_a_refusal_names_fits():
    with common.interpreted(lanes=LANES):
        widest = tpu_tiles.widest(jnp.dtype("float32"), SMALL)
    message = f"MiB of VMEM; K={widest} fits: use more heads."
    assert message in refusal(make_case(T=2, K=widest + 1), within(SMALL))
    for dtype in map(jnp.dtype, ("float32", "bfloat16")):
        widest = tpu_tiles.widest(dtype, SCOPED_BYTES)
        assert tpu_tiles.blocks(8, 64, 4, widest, dtype, SCOPED_BYTES) is not None
        assert tpu_tiles.blocks(8, 64, 4, widest + 128, dtype, SCOPED_BYTES) is None


def test_a_state_that_exceeds_vmem_takes_a_step_by_the_kernel_over_time():
    case = jax.tree.map(jnp.asarray, make_case(B=200, T=1))
    compute = functools.partial(slstm_cases.run, within(SMALL))
    assert [call.params["name"] for call in calls(compute, case)] == ["slstm_forward"]


@pytest.mark.parametrize("T", [1, 31, 32, 61, 64, 96, 97, 1000, 1023])
@pytest.mark.parametrize("fits", [1, 5, 12, 100])
def test_a_block_of_time_fits_and_pads_little(T, fits):
    steps = tpu_tiles.time_block(T, fits)
    assert 1 <= steps <= min(fits, tpu_tiles.MAX_STEPS)
    assert common.round_up(T, steps) - T <= max(2 * -(-T // steps), 0)


@pytest.mark.parametrize("B", [1, 20, 100, 700])
@pytest.mark.parametrize("K", [128, 256, 512, 768])
def test_blocks_fit_and_cover_the_call(B, K):
    dtype, H, T = jnp.dtype("bfloat16"), 8, 50
    blocks = tpu_tiles.blocks(B, T, H, K, dtype, SCOPED_BYTES)
    needed = tpu_tiles.vmem_bytes(blocks.rows, K, dtype, blocks.steps, heads=blocks.heads)
    assert needed <= SCOPED_BYTES
    assert (
        blocks.num_rows >= B and blocks.num_rows % blocks.rows == 0 == blocks.rows % tpu_tiles.ROWS
    )
    assert blocks.num_steps >= T and blocks.num_steps % blocks.steps == 0 == H % blocks.heads


@pytest.mark.parametrize(
    "how",
    [
        pltpu.InterpretParams(uninitialized_memory="nan"),
        pltpu.InterpretParams(detect_races=True, random_seed=7),
    ],
    ids=["nan", "races"],
)
@pytest.mark.parametrize("T", [1, 9])
def test_no_memory_is_read_before_it_is_written_nor_twice_at_once(how, T, capfd):
    case = make_case(T=T, flags=True)
    assert_equal_results(kernel(case, how=how, vmem=SMALL), truth(case))
    with common.interpreted(how, lanes=LANES):
        h, _ = quick.jit(run)(jax.tree.map(jnp.asarray, case._replace(reset=None, mask=None)))
    assert np.isfinite(h).all()
    assert "RACE DETECTED" not in capfd.readouterr().out
