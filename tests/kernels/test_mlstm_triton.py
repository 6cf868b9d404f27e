"""The mLSTM's Triton kernels, interpreted, against the recurrence in float64.

Programs of the interpreter cost milliseconds each, so cases are small; memory that no program has
written holds NaN.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common, gpu
from pallas_kernels.mlstm import backends
from tests import quick
from tests.kernels import mlstm_cases
from tests.kernels.mlstm_cases import (
    INPUTS,
    LANES,
    LEAVES,
    RESETS,
    assert_equal_results,
    assert_step_equals_the_cell,
    constant_normaliser,
    evaluate,
    in_bfloat16,
    make_case,
    make_step,
    truth,
    with_resets,
)
from tests.kernels.watch import launches, recorded, watched
from tests.ops.subjects import implementations
from tests.ops.tolerances import TABLE, assert_close

REFUSAL = implementations("mlstm")["triton"]

pytestmark = [
    pytest.mark.slow,  # a hundred cases by an interpreter; quick ones are among tests/ops
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]
if REFUSAL is None:
    from pallas_kernels.mlstm import triton_tiles
    from pallas_kernels.mlstm.triton_tiles import Outputs, States, Tile

run = functools.partial(mlstm_cases.run, backends.triton())


def tile(chunk, k, v, positions, rows, others, inner, memory, width, *, K, V):
    """A tile for heads of the widths K and V, of blocks that are these large where a width is."""

    def outputs(read, written):
        sizes = min(inner, read), min(memory, read), min(width, written)
        return Outputs(rows, others, *sizes, warps=4, stages=1)

    states = States(min(k, K), min(v, V), positions, warps=4, stages=1)
    h, dq = outputs(K, V), outputs(V, K)
    return Tile(chunk, states, h=h, dq=dq, dk=dq, dv=h)


@functools.cache
def usual() -> "Tile":
    """For heads of 6 and 10, filled up to 8 and 16, where blocks are not what a test is about."""
    return tile(16, 8, 16, 16, 16, 8, 16, 16, 16, K=8, V=16)


def kernel(case, **options) -> dict[str, np.ndarray]:
    """Everything by the Triton kernels, interpreted."""
    if case.q.shape[-1] == 6 and not options.keys() & {"chunk_size", "tile", "lanes"}:
        options["tile"] = usual()
    return mlstm_cases.interpret(backends.triton(), case, **options)


# Tiles


BLOCKS = {
    "one": (64, 32, 16, 64, 64, 64, 32, 32, 32),
    "chunks": (16, 32, 16, 16, 16, 16, 32, 32, 32),
    "rows, equal to others": (64, 32, 16, 32, 16, 16, 32, 32, 32),
    "rows, larger than others": (32, 32, 16, 8, 32, 8, 32, 32, 32),
    "columns of the memory": (32, 32, 8, 32, 32, 32, 32, 32, 32),
    "rows of the memory": (32, 8, 16, 32, 32, 32, 32, 32, 32),
    "columns of results": (32, 32, 16, 32, 32, 32, 32, 32, 8),
    "widths of products": (32, 32, 16, 32, 32, 16, 8, 32, 32),
    "widths of what the memory is read with": (32, 32, 16, 32, 32, 16, 32, 8, 32),
    "everything": (32, 16, 8, 16, 16, 8, 8, 16, 8),
}
every_tile = pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)


def wide_case(**options):
    """Heads of 20 and 10, filled up to 32 and 16; two chunks of 32."""
    return make_case(B=1, T=64, K=20, V=10, **options)


@every_tile
def test_blocks_of_every_kind_do_not_show(blocks):
    case = wide_case(flags=True)
    assert_equal_results(kernel(case, tile=tile(*blocks, K=32, V=16)), truth(case))


@pytest.mark.parametrize("options", [{}, {"normalize": False}], ids=["normalised", "plain"])
def test_blocks_do_not_show_with_the_sigmoid_input_gate(options):
    case = wide_case()
    options = {"input_gate": "sigmoid", **options}
    cut = tile(*BLOCKS["everything"], K=32, V=16)
    assert_equal_results(kernel(case, tile=cut, **options), truth(case, **options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_tiles_of_real_chips_equal_the_recurrence(chip, dtype):
    """Chunks of 128 in two programs of 64 positions; 100 steps fill up one."""
    case = in_bfloat16(make_case(B=1, T=100, K=48, V=128, flags=True))
    with common.compiled_for(chip):
        real = triton_tiles.mlstm(48, 128, jnp.dtype(dtype), 100, None)
    assert real.chunk == 128 and real.h.rows == 64
    actual = kernel(in_bfloat16(case, dtype), lanes=128, tile=real)
    assert_equal_results(actual, truth(case), TABLE[dtype])


@pytest.mark.parametrize("lanes", [8, 16, 32, 128])
def test_any_multiple_of_widths_may_be_interpreted(lanes):
    case = make_case(T=9)
    assert_equal_results(kernel(case, lanes=lanes, chunk_size=None), truth(case))


@pytest.mark.parametrize("blocks", ["rows, larger than others", "everything"])
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_no_program_touches_what_is_not_its_own(blocks, flags):
    """No address beyond an array, and no element that one program writes and another one uses."""
    case = wide_case(flags=flags)
    with watched() as faults:
        kernel(case, tile=tile(*BLOCKS[blocks], K=32, V=16))
    assert not faults


# Sizes


@pytest.mark.parametrize("T", [1, 7, 8, 9, 29, 64])
def test_any_length_equals_the_recurrence(T):
    case = make_case(B=1, T=T, flags=T != 8)
    assert_equal_results(kernel(case, chunk_size=8), truth(case))


@pytest.mark.parametrize("K,V", [(6, 10), (20, 20), (1, 1), (16, 3)])
def test_any_width_equals_the_recurrence(K, V):
    """What is filled up with zeros, in one direction or both, changes nothing."""
    case = make_case(B=1, T=9, K=K, V=V)
    assert_equal_results(kernel(case, chunk_size=16), truth(case))


@pytest.mark.parametrize("B,H", [(3, 1), (1, 3)])
def test_any_batch_and_number_of_heads_equals_the_recurrence(B, H):
    case = make_case(B=B, H=H, flags=True)
    assert_equal_results(kernel(case), truth(case))


@pytest.mark.parametrize("chunk_size", [8, 16, 32])
@pytest.mark.parametrize("where", RESETS)
def test_the_chunk_size_changes_nothing_wherever_resets_are(chunk_size, where):
    case = with_resets(make_case(flags=True), where, chunk_size)
    cut = tile(chunk_size, 8, 16, 8, chunk_size, 8, 16, 16, 16, K=8, V=16)
    assert_equal_results(kernel(case, tile=cut), truth(case))


# Numbers


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_equal_the_recurrence(dtype, flags):
    case = in_bfloat16(make_case(flags=flags))
    assert_equal_results(kernel(in_bfloat16(case, dtype)), truth(case), TABLE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"normalize": False}, {"eps": 0.5}, {}], ids=str)
def test_the_sigmoid_input_gate_equals_the_recurrence(options, dtype):
    case = in_bfloat16(make_case(flags=True))
    options = {"input_gate": "sigmoid", **options}
    actual = kernel(in_bfloat16(case, dtype), **options)
    assert_equal_results(actual, truth(case, **options), TABLE[dtype])


def test_a_normaliser_without_gradient_is_a_constant():
    case = make_case(flags=True)
    constant = truth(case, constant_normaliser)
    actual = kernel(case, normalizer_grad=False)
    assert_equal_results(actual, constant)
    # It matters: under this loss the whole gradient is another one.
    error = np.abs(actual["dq"] - truth(case)["dq"]).max()
    assert error > 0.1 * np.abs(constant["dq"]).max()


def test_states_saved_in_bfloat16_cost_gradients_their_digits():
    """h reads the states at chunk starts as they are saved, the last one is never rounded."""
    case = make_case(flags=True)
    expected, wide = truth(case), kernel(case)
    narrow = kernel(case, saved_dtype=jnp.dtype("bfloat16"))
    assert_equal_results(narrow, expected, TABLE["bfloat16"])
    for name in LEAVES:
        np.testing.assert_array_equal(narrow[name], wide[name])
    for name in ("dq", "df"):
        errors = [np.abs(result[name] - expected[name]).max() for result in (wide, narrow)]
        assert errors[0] < 0.1 * errors[1]


def test_states_saved_in_float32_serve_inputs_of_bfloat16():
    case = in_bfloat16(make_case(flags=True))
    actual = kernel(in_bfloat16(case, "bfloat16"), saved_dtype=jnp.dtype("float32"))
    assert_equal_results(actual, truth(case), TABLE["bfloat16"])


@pytest.mark.parametrize("scale", [8.0, 30.0])
def test_large_gates_equal_the_recurrence(scale):
    case = wide_case(scale=scale, flags=True)
    actual = kernel(case, tile=tile(*BLOCKS["rows, equal to others"], K=32, V=16))
    assert_equal_results(actual, truth(case), TABLE["float32, large gates"])


def test_a_memory_of_tiny_scale_is_read_as_little_as_by_the_recurrence():
    """Log-scales around the lowest at which a memory is read, and nothing that is written."""
    case = make_case(flags=True)
    case.state[2][:] = [[-20.0, -25.0], [-22.0, -200.0]]
    case.i[:] -= 250
    case.reset[:] = False
    actual, expected = kernel(case), truth(case)
    assert np.abs(expected["h"]).max() < 1e-6
    assert_close(actual["h"], expected["h"], TABLE["float32"].h, "h")


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 3e38])
def test_a_masked_step_is_never_read(rubbish):
    case = make_case(flags=True)
    dirty = {name: getattr(case, name).copy() for name in (*INPUTS, "dh")}
    for array in dirty.values():
        array[~case.mask] = rubbish
    dirty["dh"] = np.where(np.isfinite(dirty["dh"]), dirty["dh"], 1e6)  # of an h that is 0
    clean, found = kernel(case), kernel(case._replace(**dirty, reset=case.reset | ~case.mask))
    for name, value in clean.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    for name in ("h", *(f"d{name}" for name in INPUTS)):
        assert not clean[name][~case.mask].any()


def test_where_all_is_masked_the_state_stays_bit_for_bit():
    case = make_case(flags=True)
    case.mask[:] = False
    actual = kernel(case)
    for name, leaf in zip(LEAVES, case.state, strict=True):
        np.testing.assert_array_equal(actual[name], leaf, err_msg=name)
    for name, cotangent in zip(LEAVES, case.dstate, strict=True):
        assert_close(actual[f"d{name}"], cotangent.astype(np.float64), 1e-5, f"d{name}")


# What is launched


FORWARD = {"mlstm_states": 1, "mlstm_h": 1}
BACKWARD = dict.fromkeys(("mlstm_dstates", "mlstm_dq", "mlstm_dk", "mlstm_dv"), 1)


def started(function, *arguments) -> dict[str, int]:
    """How often kernels are launched, by name."""
    return collections.Counter(launch.name for launch in launches(function, *arguments))


def small_case(**options):
    return jax.tree.map(jnp.asarray, make_case(B=1, T=9, **options))


def test_a_forward_pass_launches_two_kernels_and_its_gradient_four_more():
    case = small_case()
    assert started(lambda c: run(c), case) == FORWARD
    gradient = jax.grad(lambda c: jnp.sum(run(c)[0] * c.dh))
    assert started(gradient, case) == FORWARD | BACKWARD


def test_as_many_programs_are_launched_as_there_are_blocks():
    case = jax.tree.map(jnp.asarray, wide_case())
    cut = mlstm_cases.cut(backends.triton(), tile(*BLOCKS["everything"], K=32, V=16))
    grids = dict(launches(functools.partial(evaluate, functools.partial(by, cut)), case))
    heads, rows = 2, 4  # 64 positions in blocks of 16
    memory = heads * (32 // 16) * (16 // 8)
    assert grids == {
        "mlstm_states": (memory,),
        "mlstm_dstates": (memory,),
        "mlstm_h": (heads * rows, 16 // 8),
        "mlstm_dv": (heads * rows, 16 // 8),
        "mlstm_dq": (heads * rows, 32 // 8),
        "mlstm_dk": (heads * rows, 32 // 8),
    }


def test_kernels_are_compiled_for_the_chip_as_its_tile_says(monkeypatch):
    """The gradient too, although it is traced when the chip is no longer named."""
    seen = {}

    def call(kernel, arrays, out_shape, *, name, **settings):
        seen[name] = settings
        return tuple(jnp.zeros(x.shape, x.dtype) for x in out_shape)

    monkeypatch.setattr(gpu, "call", call)
    case = jax.tree.map(jnp.asarray, in_bfloat16(make_case(T=100, K=64, V=512), "bfloat16"))

    def forward(c):
        with common.compiled_for("sm_90"):
            return run(c)[0]

    jax.eval_shape(jax.grad(lambda c: jnp.sum(forward(c) * c.dh)), case)
    jax.eval_shape(forward, jax.tree.map(jnp.asarray, make_case(T=1)))
    with common.compiled_for("sm_90"):
        cut = triton_tiles.mlstm(64, 512, jnp.dtype("bfloat16"), 100, None)
    assert seen.keys() == {*FORWARD, *BACKWARD, "mlstm_decode"}
    blocks = {"mlstm_states": cut.states, "mlstm_dstates": cut.states}
    blocks |= {f"mlstm_{name}": getattr(cut, name) for name in ("h", "dq", "dk", "dv")}
    for name, settings in seen.items():
        assert settings["target"] == "sm_90" and not settings["interpret"]
        assert not settings.get("UPCAST")
        if name in blocks:
            given = settings["num_warps"], settings["num_stages"]
            assert given == (blocks[name].warps, blocks[name].stages)


def by(kernels, q, k, v, i, f, state, **options):
    return mlstm_cases.vjp.mlstm(kernels, q, k, v, i, f, state, **options)


def test_what_remat_keeps_is_not_computed_again():
    case = small_case()
    names = ("mlstm_h", "mlstm_rows", "mlstm_states")

    def gradient(policy):
        again = jax.checkpoint(lambda c: run(c)[0], policy=policy)
        return jax.grad(lambda c: jnp.sum(again(c) * c.dh))

    policies = jax.checkpoint_policies
    kept = gradient(policies.save_only_these_names(*names))
    assert started(kept, case) == FORWARD | BACKWARD
    twice = {name: 2 for name in FORWARD}
    assert started(gradient(policies.nothing_saveable), case) == twice | BACKWARD
    expected = jax.grad(lambda c: jnp.sum(run(c)[0] * c.dh))
    with common.interpreted(lanes=LANES):
        found, expected = (quick.jit(g)(case) for g in (kept, expected))
    jax.tree.map(np.testing.assert_array_equal, found[:5], expected[:5])


# vmap


MAPPED = {
    "everything": Ellipsis,
    "queries": ("q", "dh"),
    "gates and flags": ("i", "f", "reset", "mask"),
    "the state": ("state",),
}


def stack(names, **options):
    """Cases that differ in these fields, one case with another axis in front, and where it is."""
    cases = [make_case(T=9, B=1, flags=True, seed=seed, **options) for seed in range(2)]
    shared = cases[0]._asdict()
    names = shared.keys() if names is Ellipsis else names
    cases = [case._replace(**{n: a for n, a in shared.items() if n not in names}) for case in cases]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    axes = jax.tree.map(lambda _: None, stacked)
    axes = axes._replace(**{n: jax.tree.map(lambda _: 0, shared[n]) for n in names})
    one = jax.tree.map(jnp.asarray, cases[0])._asdict()
    stacked = stacked._replace(**{n: a for n, a in one.items() if n not in names})
    return cases, stacked, axes


@pytest.mark.parametrize("names", MAPPED.values(), ids=MAPPED)
def test_vmap_equals_a_loop(names):
    """Values and gradients; as many kernels as without it, each for the joint batch."""
    cases, stacked, axes = stack(names)
    compute = functools.partial(evaluate, functools.partial(by, backends.triton()))
    together = jax.vmap(compute, in_axes=(axes,))
    with common.interpreted(lanes=LANES), recorded() as found:
        actual = quick.jit(together)(stacked)
    for number, case in enumerate(cases):
        one = {name: np.asarray(a[number], np.float64) for name, a in actual.items()}
        assert_equal_results(one, truth(case))
    assert collections.Counter(launch.name for launch in found) == FORWARD | BACKWARD


def test_the_gradient_of_a_vmap_equals_a_loop():
    cases, stacked, axes = stack(Ellipsis)

    def compute(*args, reset, mask):
        def one(args, flags):
            return by(backends.triton(), *args, **flags)

        return jax.vmap(one)(args, dict(reset=reset, mask=mask))

    with common.interpreted(lanes=LANES):
        actual = quick.jit(functools.partial(evaluate, compute))(stacked)
    for number, case in enumerate(cases):
        one = {name: np.asarray(a[number], np.float64) for name, a in actual.items()}
        assert_equal_results(one, truth(case))


def test_without_jit_all_is_the_same():
    case = small_case()
    with common.interpreted(lanes=LANES):
        found, expected = (function(case) for function in (run, quick.jit(lambda c: run(c))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


# One step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_one_step_equals_the_cell(flags, dtype):
    case = make_step(dtype)
    if not flags:
        case = jax.tree.map(lambda x: x[:2], case)._replace(reset=None, mask=None)
    assert_step_equals_the_cell(case, step(case))


def step(case, **options):
    with common.interpreted(lanes=LANES):
        compute = quick.jit(functools.partial(run, **options))
        return compute(jax.tree.map(jnp.asarray, case))


@pytest.mark.parametrize("options", [{"normalize": False}, {"eps": 0.5}, {}], ids=str)
def test_one_step_with_the_sigmoid_input_gate_equals_the_cell(options):
    case = make_step()
    case = jax.tree.map(lambda x: x[:2], case._replace(mask=None))
    options = {"input_gate": "sigmoid", **options}
    assert_step_equals_the_cell(case, step(case, **options), **options)


@pytest.mark.parametrize("K,V", [(1, 1), (5, 33), (64, 64), (257, 40), (600, 7)])
def test_one_step_of_any_width_equals_the_cell(K, V):
    """Blocks of 32 columns and of up to 256 rows; what they lack is masked."""
    case = make_step(K=K, V=V)
    assert_step_equals_the_cell(case, step(case))


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_one_step_has_the_gradients_of_the_cell(flags):
    case = make_case(B=4, T=1)
    if flags:
        reset, mask = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool)[..., None]
        case = case._replace(reset=reset, mask=mask)
    assert_equal_results(kernel(case, chunk_size=8), truth(case))


def test_one_step_decodes_unless_it_is_differentiated():
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    assert started(lambda c: run(c), case) == {"mlstm_decode": 1}
    gradient = jax.grad(lambda c: jnp.sum(run(c)[0] * c.dh))
    assert started(gradient, case) == FORWARD | BACKWARD


@pytest.mark.parametrize("V,programs", [(1, 1), (64, 2), (65, 3)])
def test_one_step_has_a_program_for_every_32_columns_of_a_head(V, programs):
    case = jax.tree.map(jnp.asarray, make_case(B=2, H=3, T=1, V=V))
    assert launches(lambda c: run(c), case) == [("mlstm_decode", (6, programs))]


def test_one_step_writes_the_memory_in_place_and_its_normaliser_elsewhere(monkeypatch):
    """C goes to the kernel as it is. Of n each program of other columns needs the old one."""
    seen = []
    call = gpu.call

    def spy(kernel, arrays, out_shape, **settings):
        seen.append((arrays, out_shape, settings["aliases"]))
        return call(kernel, arrays, out_shape, **settings)

    monkeypatch.setattr(gpu, "call", spy)
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    with common.interpreted(lanes=LANES):
        jax.make_jaxpr(lambda c: run(c))(case)
    ((arrays, out_shape, aliases),) = seen
    ((source, result),) = aliases.items()
    C = case.state[0]
    assert (arrays[source].shape, out_shape[result].shape) == (C.shape, C.shape)
    assert arrays[source].dtype == out_shape[result].dtype == C.dtype


def test_no_program_of_one_step_touches_what_is_not_its_own():
    case = make_step(K=257, V=40)
    with watched() as faults:
        step(case)
    assert not faults


@pytest.mark.parametrize("names", MAPPED.values(), ids=MAPPED)
def test_vmap_of_one_step_equals_a_loop(names):
    cases, stacked, axes = stack(names, K=5)
    first = lambda c: [x[:, :1] for x in (*c[:5], c.reset, c.mask)]  # noqa: E731

    def compute(case):
        *inputs, reset, mask = first(case)
        return by(backends.triton(), *inputs, case.state, reset=reset, mask=mask)

    with common.interpreted(lanes=LANES):
        together = quick.jit(jax.vmap(compute, in_axes=(axes,)))(stacked)
        alone = [quick.jit(compute)(jax.tree.map(jnp.asarray, case)) for case in cases]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), together, expected
    )
