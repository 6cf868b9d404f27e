"""What is particular to the sLSTM's TPU kernels: blocks, filling up, saved gates, decoding."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import common
from pallas_kernels.slstm import packed, sizes
from pallas_kernels.slstm.decode import slstm_decode
from pallas_kernels.slstm.vjp import slstm
from tests import quick
from tests.kernels.calls import calls
from tests.ops.tolerances import TABLE, assert_close, assert_gradients_close
from xlstm_jax import cells

# Interpreted kernels, two hundred of them: once is enough. Quick ones are among tests/ops.
pytestmark = pytest.mark.slow

LANES = 8
STEPS = 4
SMALL = sizes.vmem_bytes(sizes.ROWS, LANES, jnp.dtype("float32"), STEPS)
"""Bytes of VMEM in which one head of 8 rows has room for 4 steps."""

LEAVES = ("c", "n", "h", "m")


class Case(NamedTuple):
    x: Any
    r: Any
    b: Any
    state: tuple
    dh: Any
    dstate: tuple
    reset: Any = None
    mask: Any = None


def make_case(B=2, T=13, H=2, K=8, *, flags=False, scale=1.0, seed=0) -> Case:
    """Random arguments and a random loss on h and on every leaf of the last state, as stored."""
    rng = np.random.default_rng([seed, B, T, H, K])
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    state = (0.5 * normal(B, H, K), 1 + abs(normal(B, H, K)), 0.3 * normal(B, H, K))
    dstate = tuple(normal(B, H, K) for _ in LEAVES)
    r = 0.5 * K**-0.5 * normal(H, K, 4, K)
    b = 0.5 * normal(H, 4, K)
    x, dh = scale * normal(B, T, 4, H, K), normal(B, T, H, K)
    case = Case(x, r, b, (*state, normal(B, H, K)), dh, dstate)
    if not flags:
        return case
    return case._replace(reset=rng.random((B, T)) < 0.2, mask=rng.random((B, T)) < 0.7)


def evaluate(function, case: Case) -> dict[str, np.ndarray]:
    """h, the last state and all gradients, by name."""

    def run(case):
        compute = functools.partial(function, reset=case.reset, mask=case.mask)
        (h, state), pull = jax.vjp(compute, case.x, case.r, case.b, case.state)
        return h, state, pull((case.dh, case.dstate))

    h, state, (dx, dr, db, dstate) = jax.tree.map(
        lambda a: np.asarray(a, np.float64), quick.jit(run)(case)
    )
    named = {"h": h, "dx": dx, "dr": dr, "db": db}
    named |= {name: leaf for name, leaf in zip(LEAVES, state, strict=True) if name != "h"}
    return named | {f"d{name}": leaf for name, leaf in zip(LEAVES, dstate, strict=True)}


def kernel(case: Case, *, how=True, lanes=LANES, **options) -> dict[str, np.ndarray]:
    """By the kernels, interpreted."""
    function = functools.partial(slstm, **options)
    with common.interpreted(how, lanes=lanes):
        return evaluate(function, jax.tree.map(jnp.asarray, case))


def truth(case: Case, **options) -> dict[str, np.ndarray]:
    """By the cell, in float64."""

    def function(x, r, b, state, reset, mask):
        state = cells.SLSTMState(*state)
        h, state = cells.slstm_scan(x, r, b, state, reset=reset, mask=mask, **options)
        return h, tuple(state)

    with jax.enable_x64(True):
        wide = lambda a: jnp.asarray(a, bool if a.dtype == bool else "float64")  # noqa: E731
        return evaluate(function, jax.tree.map(wide, case))


def assert_equal_results(actual, expected, row=TABLE["float32"]):
    """h, the state and its log-scale as stored, and all gradients agree."""
    gradients = [name for name in expected if name.startswith("d")]
    for name in expected.keys() - gradients:
        assert_close(actual[name], expected[name], row.h, name)
    pick = lambda results: {name[1:]: results[name] for name in gradients}  # noqa: E731
    assert_gradients_close(pick(actual), pick(expected), row)


@pytest.mark.parametrize("T", [1, STEPS - 1, STEPS, STEPS + 1, 3 * STEPS + 1, 3 * STEPS + 2])
def test_blocks_of_time_do_not_show(T):
    flags = T % STEPS == 2  # a number of steps without, one with, that has to be filled up
    case = make_case(T=T, flags=flags)
    assert_equal_results(kernel(case, vmem_bytes=SMALL), truth(case))


def test_any_batch_width_and_number_of_heads_equals_the_recurrence():
    """Two blocks of rows, the second filled up; three heads one by one, their width filled up."""
    case = make_case(B=11, T=10, H=3, K=6, flags=True)
    assert sizes.blocks(11, 10, 3, 8, jnp.dtype("float32"), SMALL).num_rows == 16
    assert_equal_results(kernel(case, vmem_bytes=SMALL), truth(case))


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_several_heads_of_one_program_equal_the_recurrence(flags):
    case = make_case(T=12, H=8, K=6, flags=flags)
    assert sizes.blocks(2, 12, 8, 8, jnp.dtype("float32"), common.SCOPED_BYTES).heads == 4
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


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("save_gates", [False, True], ids=["computed", "saved"])
def test_gates_may_be_saved_or_computed_again(save_gates, flags):
    case = make_case(flags=flags)
    assert_equal_results(kernel(case, save_gates=save_gates), truth(case))


@pytest.mark.parametrize("save_gates", [False, True], ids=["computed", "saved"])
@pytest.mark.parametrize("r_dtype", ["bfloat16", "float32"])
def test_bfloat16_rounds_operands_only(r_dtype, save_gates):
    case = make_case(T=24, flags=True)
    half = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)  # noqa: E731
    case = case._replace(x=half(case.x), r=half(case.r), dh=half(case.dh))
    dtypes = {"x": jnp.bfloat16, "dh": jnp.bfloat16, "r": r_dtype}
    given = case._replace(
        **{name: jnp.asarray(getattr(case, name), d) for name, d in dtypes.items()}
    )
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
    multiply = jax.jit(lambda a, w: packed.times(a, packed.pack(w[None])[0]))
    product = np.asarray(multiply(a, w))
    expected = a.astype(np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(product, expected, rtol=0, atol=3e-7 * np.abs(expected).max())


def test_rows_filled_up_change_no_bit_of_the_others():
    """A batch of 3 beside the same batch with five more rows."""
    case = make_case(B=8, flags=True)
    cut = jax.tree.map(lambda a: a[:3], case)._replace(r=case.r, b=case.b)
    eight, three = kernel(case), kernel(cut)
    for name in eight.keys() - {"dr", "db"}:
        np.testing.assert_array_equal(three[name], eight[name][:3], err_msg=name)


def test_lanes_filled_up_change_nothing():
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
    reset, mask = (None if flag is None else flag[:, 0] for flag in (case.reset, case.mask))
    arguments = jax.tree.map(jnp.asarray, (case.x[:, 0], case.r, case.b, case.state, reset, mask))
    with common.interpreted(lanes=LANES):
        h, new = slstm_decode(*arguments, forget_gate=forget_gate)
    expected = truth(case, forget_gate=forget_gate)
    assert_close(np.asarray(h), expected["h"][:, 0], 1e-6, "h")
    for name, leaf in zip(LEAVES, new, strict=True):
        if name != "h":
            assert_close(np.asarray(leaf), expected[name], 1e-6, name)
    kept = slice(2, 3) if flags else slice(0, 0)
    for old, leaf in zip(case.state, new, strict=True):
        np.testing.assert_array_equal(leaf[kept], old[kept])


def test_decoding_writes_the_state_in_place():
    """Each leaf of the state goes to the kernel as it is and shares its buffer with an output."""
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    (call,) = calls(lambda c: slstm_decode(c.x[:, 0], c.r, c.b, c.state), case)
    assert dict(call.params["input_output_aliases"]) == {3: 0, 4: 1, 5: 2, 6: 3}


def test_one_step_decodes_unless_it_is_differentiated():
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    names = lambda function: [call.params["name"] for call in calls(function, case)]  # noqa: E731
    assert names(lambda c: slstm(c.x, c.r, c.b, c.state)) == ["slstm_decode"]
    loss = lambda c: slstm(c.x, c.r, c.b, c.state)[0].sum()  # noqa: E731
    assert names(jax.grad(loss)) == ["slstm_forward", "slstm_backward"]


def test_without_a_gradient_only_h_and_the_state_are_written():
    case = jax.tree.map(jnp.asarray, make_case())
    (call,) = calls(lambda c: slstm(c.x, c.r, c.b, c.state), case)
    assert len(call.outvars) == 2


def test_what_remat_keeps_is_not_computed_again():
    case = jax.tree.map(jnp.asarray, make_case())
    names = ("slstm_h", "slstm_states", "slstm_gates")

    def gradient(policy):
        run = jax.checkpoint(lambda c: slstm(c.x, c.r, c.b, c.state)[0], policy=policy)
        return jax.grad(lambda c: jnp.sum(run(c) * c.dh))

    kept = gradient(jax.checkpoint_policies.save_only_these_names(*names))
    count = lambda function: len(calls(function, case))  # noqa: E731
    assert count(kept) == 2
    assert count(gradient(jax.checkpoint_policies.nothing_saveable)) == 3


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

    def run(case):
        compute = functools.partial(slstm, reset=case.reset, mask=case.mask, vmem_bytes=SMALL)
        outputs, pull = jax.vjp(compute, case.x, case.r, case.b, case.state)
        return compute(case.x, case.r, case.b, case.state), outputs, pull((case.dh, case.dstate))

    with common.interpreted(lanes=LANES):
        together = quick.jit(jax.vmap(run, in_axes=(axes,)))(stacked)
        alone = [quick.jit(run)(jax.tree.map(jnp.asarray, case)) for case in cases]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), together, expected
    )


def refusal(case: Case, **options) -> str:
    arguments = jax.tree.map(jnp.asarray, (case.x, case.r, case.b, case.state))
    with common.interpreted(lanes=LANES), pytest.raises(ValueError) as error:
        slstm(*arguments, **options)
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
        widest = sizes.widest(jnp.dtype("float32"), SMALL)
    message = f"do not fit into {SMALL} bytes of VMEM; K may be up to {widest}."
    assert message in refusal(make_case(T=2, K=widest + 1), vmem_bytes=SMALL)
    for dtype in map(jnp.dtype, ("float32", "bfloat16")):
        widest = sizes.widest(dtype, common.SCOPED_BYTES)
        assert sizes.blocks(8, 64, 4, widest, dtype, common.SCOPED_BYTES) is not None
        assert sizes.blocks(8, 64, 4, widest + 128, dtype, common.SCOPED_BYTES) is None


def test_a_state_that_vmem_cannot_hold_is_not_decoded():
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    with pytest.raises(ValueError, match="use fewer rows at a time"):
        slstm_decode(case.x[:, 0], case.r, case.b, case.state, vmem_bytes=SMALL // 8)


@pytest.mark.parametrize("T", [1, 31, 32, 61, 64, 96, 97, 1000, 1023])
@pytest.mark.parametrize("fits", [1, 5, 12, 100])
def test_a_block_of_time_fits_and_fills_up_little(T, fits):
    steps = sizes.time_block(T, fits)
    assert 1 <= steps <= min(fits, sizes.MAX_STEPS)
    assert common.round_up(T, steps) - T <= max(2 * -(-T // steps), 0)


@pytest.mark.parametrize("B", [1, 20, 100, 700])
@pytest.mark.parametrize("K", [128, 256, 512, 768])
def test_blocks_fit_and_cover_the_call(B, K):
    dtype, H, T = jnp.dtype("bfloat16"), 8, 50
    blocks = sizes.blocks(B, T, H, K, dtype, common.SCOPED_BYTES)
    needed = sizes.vmem_bytes(blocks.rows, K, dtype, blocks.steps, heads=blocks.heads)
    assert needed <= common.SCOPED_BYTES
    assert blocks.num_rows >= B and blocks.num_rows % blocks.rows == 0 == blocks.rows % sizes.ROWS
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
    assert_equal_results(kernel(case, how=how, vmem_bytes=SMALL), truth(case))
    with common.interpreted(how, lanes=LANES):
        h, _ = quick.jit(slstm)(*jax.tree.map(jnp.asarray, case[:4]))
    assert np.isfinite(h).all()
    assert "RACE DETECTED" not in capfd.readouterr().out
