"""The mLSTM Triton kernels, interpreted: launches, `vmap`, one step."""

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
    LANES,
    assert_results_match,
    assert_step_matches_cell,
    evaluate,
    in_bfloat16,
    make_case,
    make_step_case,
    reference,
)
from tests.kernels.triton_interpreter import (
    launches,
    race_detector,
    recorded_launches,
    shared_buffers,
)
from tests.ops.subjects import implementations

REFUSAL = implementations("mlstm")["triton"]

pytestmark = [
    pytest.mark.slow,  # interpreted; quick cases are in tests/ops and test_quick.py
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
]
if REFUSAL is None:
    from pallas_kernels.mlstm import triton_tiles
    from tests.kernels.test_mlstm_triton import BLOCKS, tile, wide_case

run = functools.partial(mlstm_cases.run, backends.triton())
kernel = functools.partial(mlstm_cases.interpret, backends.triton())


# Launches


FORWARD, BACKWARD = (
    {f"mlstm_{name}": 1 for name in names}
    for names in (
        ("chunk_maps", "gates", "states", "h"),
        ("gates_backward", "dstates", "dq", "dk", "dv", "gate_grads"),
    )
)

GATES = ("mlstm_chunk_maps", "mlstm_gates", "mlstm_gates_backward", "mlstm_gate_grads")


def launch_counts(function, *arguments) -> dict[str, int]:
    """Number of launches by kernel name."""
    return collections.Counter(launch.name for launch in launches(function, *arguments))


def small_case(**options):
    """One sequence of 9 positions, as JAX arrays."""
    return jax.tree.map(jnp.asarray, make_case(B=1, T=9, **options))


def test_passes_launch_each_kernel_once():
    case = small_case()
    assert launch_counts(lambda c: run(c), case) == FORWARD
    gradient = jax.grad(lambda c: jnp.sum(run(c)[0] * c.dh))
    assert launch_counts(gradient, case) == FORWARD | BACKWARD


def test_grids_have_one_program_per_block():
    case = jax.tree.map(jnp.asarray, wide_case())
    kernels = mlstm_cases.with_tile(backends.triton(), tile(*BLOCKS["all dimensions"], K=32, V=16))
    compute = functools.partial(mlstm, kernels)
    grids = dict(launches(functools.partial(evaluate, compute), case))
    heads, blocks = 2, 4  # 64 positions in blocks of 16
    chunks = 64 // 32
    state_blocks = heads * (32 // 16) * (16 // 8)
    assert grids == {
        "mlstm_states": (state_blocks,),
        "mlstm_dstates": (state_blocks,),
        "mlstm_h": (blocks, heads * 16 // 8),
        "mlstm_dv": (blocks, heads * 16 // 8),
        "mlstm_dq": (blocks, heads * 32 // 8),
        "mlstm_dk": (blocks, heads * 32 // 8),
    } | dict.fromkeys(GATES, (chunks, heads))


def test_kernels_are_compiled_for_the_ahead_of_time_target(monkeypatch):
    """The gradient too, although it is traced outside of the `compiled_for` context."""
    settings_by_kernel = {}

    def call(kernel, arrays, out_shape, *, name, **settings):
        settings_by_kernel[name] = settings
        return tuple(jnp.zeros(x.shape, x.dtype) for x in out_shape)

    monkeypatch.setattr(gpu, "call", call)
    case = jax.tree.map(jnp.asarray, in_bfloat16(make_case(T=100, K=64, V=512), "bfloat16"))

    def forward(c):
        with common.compiled_for("sm_90"):
            return run(c)[0]

    jax.eval_shape(jax.grad(lambda c: jnp.sum(forward(c) * c.dh)), case)
    jax.eval_shape(forward, jax.tree.map(jnp.asarray, make_case(T=1)))
    with common.compiled_for("sm_90"):
        target_tile = triton_tiles.choose(64, 512, jnp.dtype("bfloat16"), 100, None)
    assert settings_by_kernel.keys() == {*FORWARD, *BACKWARD, "mlstm_decode"}
    blocks = {"mlstm_states": target_tile.states, "mlstm_dstates": target_tile.states}
    blocks |= {f"mlstm_{name}": getattr(target_tile, name) for name in ("h", "dq", "dk", "dv")}
    for name, settings in settings_by_kernel.items():
        assert settings["target"] == "sm_90" and not settings["interpret"]
        assert not settings.get("UPCAST")
        if name in blocks:
            launch_options = settings["num_warps"], settings["num_stages"]
            assert launch_options == (blocks[name].warps, blocks[name].stages)


def mlstm(kernels, q, k, v, i, f, state, **options):
    """The op by these kernels, with the gates as positional arguments."""
    return mlstm_cases.api.mlstm(kernels, q, k, v, i, f, state, **options)


# vmap


MAPPED = {
    "everything": Ellipsis,
    "queries": ("q", "dh"),
    "gates and flags": ("i", "f", "reset", "mask"),
    "the state": ("state",),
}


def stack(names, **options):
    """Cases that differ in the fields `names`, the stacked case, and its `in_axes`."""
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
def test_vmap_matches_a_loop(names):
    """Values and gradients; `vmap` folds into the batch and adds no launches."""
    cases, stacked, axes = stack(names)
    compute = functools.partial(evaluate, functools.partial(mlstm, backends.triton()))
    mapped = jax.vmap(compute, in_axes=(axes,))
    with common.interpreted(lanes=LANES), recorded_launches() as launch_list:
        actual = quick.jit(mapped)(stacked)
    for index, case in enumerate(cases):
        one = {name: np.asarray(a[index], np.float64) for name, a in actual.items()}
        assert_results_match(one, reference(case))
    assert collections.Counter(launch.name for launch in launch_list) == FORWARD | BACKWARD


def test_gradient_of_a_vmap_matches_a_loop():
    cases, stacked, axes = stack(Ellipsis)

    def compute(*args, reset, mask):
        def one(args, flags):
            return mlstm(backends.triton(), *args, **flags)

        return jax.vmap(one)(args, dict(reset=reset, mask=mask))

    with common.interpreted(lanes=LANES):
        actual = quick.jit(functools.partial(evaluate, compute))(stacked)
    for index, case in enumerate(cases):
        one = {name: np.asarray(a[index], np.float64) for name, a in actual.items()}
        assert_results_match(one, reference(case))


def test_results_without_jit_match_those_with_jit():
    case = small_case()
    with common.interpreted(lanes=LANES):
        actual, expected = (function(case) for function in (run, quick.jit(lambda c: run(c))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), actual, expected)


# One step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_one_step_matches_the_cell(forget_gate, flags, dtype):
    case, options = make_step_case(dtype), {"forget_gate": forget_gate}
    if not flags:
        case = jax.tree.map(lambda x: x[:2], case)._replace(reset=None, mask=None)
    assert_step_matches_cell(case, step(case, **options), **options)


def step(case, **options):
    """h and the state of one step, interpreted."""
    with common.interpreted(lanes=LANES):
        compute = quick.jit(functools.partial(run, **options))
        return compute(jax.tree.map(jnp.asarray, case))


@pytest.mark.parametrize(
    "options", [{"normalize": False}, {"eps": 0.5}, {}, {"forget_gate": "exp"}], ids=str
)
def test_one_step_with_sigmoid_input_gate_matches_the_cell(options):
    case = make_step_case()
    case = jax.tree.map(lambda x: x[:2], case._replace(mask=None))
    options = {"input_gate": "sigmoid", **options}
    assert_step_matches_cell(case, step(case, **options), **options)


@pytest.mark.parametrize("K,V", [(1, 1), (5, 33), (257, 40), (600, 7)])
def test_one_step_of_any_width_matches_the_cell(K, V):
    """Blocks have 32 columns and up to 256 rows; partial blocks are masked."""
    case = make_step_case(K=K, V=V)
    assert_step_matches_cell(case, step(case))


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_gradients_of_one_step_match_the_cell(flags):
    case = make_case(B=4, T=1)
    if flags:
        reset, mask = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool)[..., None]
        case = case._replace(reset=reset, mask=mask)
    assert_results_match(kernel(case, chunk_size=8), reference(case))


def test_one_step_uses_the_decode_kernel_unless_differentiated():
    case = jax.tree.map(jnp.asarray, make_case(T=1))
    assert launch_counts(lambda c: run(c), case) == {"mlstm_decode": 1}
    gradient = jax.grad(lambda c: jnp.sum(run(c)[0] * c.dh))
    assert launch_counts(gradient, case) == FORWARD | BACKWARD


@pytest.mark.parametrize("V,programs", [(1, 1), (64, 2), (65, 3)])
def test_grid_of_one_step_has_a_program_per_head_and_32_columns(V, programs):
    case = jax.tree.map(jnp.asarray, make_case(B=2, H=3, T=1, V=V))
    assert launches(lambda c: run(c), case) == [("mlstm_decode", (6, programs))]


@pytest.mark.parametrize("V", [12, 40], ids=["one program per head", "two"])
def test_one_step_may_write_the_state_over_the_old_one(V):
    """Where XLA updates a slice of a loop carry, C and the new C have one buffer."""
    case = make_step_case(V=V)
    with shared_buffers(), race_detector() as errors:
        actual = step(case)
    assert not errors
    assert_step_matches_cell(case, actual)


def test_programs_of_one_step_have_no_races():
    case = make_step_case(K=257, V=40)
    with race_detector() as errors:
        step(case)
    assert not errors


@pytest.mark.parametrize("names", MAPPED.values(), ids=MAPPED)
def test_vmap_of_one_step_matches_a_loop(names):
    cases, stacked, axes = stack(names, K=5)
    first = lambda c: [x[:, :1] for x in (*c[:5], c.reset, c.mask)]  # noqa: E731

    def compute(case):
        *inputs, reset, mask = first(case)
        return mlstm(backends.triton(), *inputs, case.state, reset=reset, mask=mask)

    with common.interpreted(lanes=LANES):
        actual = quick.jit(jax.vmap(compute, in_axes=(axes,)))(stacked)
        by_loop = [quick.jit(compute)(jax.tree.map(jnp.asarray, case)) for case in cases]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *by_loop)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), actual, expected
    )
