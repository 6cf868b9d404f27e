"""Every Triton kernel, forward and gradient, compiles for every chip, and fits its registers."""

import re

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import gpu_resources
from experiments.benchmarks.gpu_resources import WIDTHS
from experiments.benchmarks.kernel_cases import PARTS, Case
from pallas_kernels import common
from pallas_kernels.aot import compiler, resources
from tests.compile import calls
from xlstm_jax import ops

KERNELS = {
    "mlstm": {
        "forward": {"mlstm_states", "mlstm_h"},
        "gradient": {f"mlstm_{x}" for x in ("states", "h", "dstates", "dq", "dk", "dv")},
        "decode": {"mlstm_decode"},
    },
    "slstm": {
        "forward": {"slstm_forward"},
        "gradient": {"slstm_forward", "slstm_backward"},
        "decode": {"slstm_decode"},
    },
}
TRITON = dict(implementation="triton")
CALLS = {
    "mlstm": calls.mlstm(512, 256, 512, **TRITON),
    "mlstm, resets and masks": calls.mlstm(512, 256, 512, flags=True, **TRITON),
    "mlstm, odd sizes, float32": calls.mlstm(300, 40, 96, jnp.float32, **TRITON),
    "mlstm, sigmoid, no normaliser": calls.mlstm(
        256, 128, 256, input_gate="sigmoid", normalize=False, **TRITON
    ),
    "slstm": calls.slstm(256, 256, **TRITON),
    "slstm, resets and masks": calls.slstm(100, 64, flags=True, **TRITON),
    "slstm, float32": calls.slstm(64, 128, jnp.float32, **TRITON),
}
STEPS = {
    "mlstm": calls.mlstm(1, 256, 512, **TRITON),
    "mlstm, odd widths": calls.mlstm(1, 40, 96, jnp.float32, **TRITON),
    "mlstm, resets and masks": calls.mlstm(1, 256, 512, flags=True, **TRITON),
    "slstm": calls.slstm(1, 256, **TRITON),
    "slstm, resets and masks": calls.slstm(1, 64, jnp.float32, flags=True, **TRITON),
}


def _param(*values):
    """A case of the op that the first value begins with."""
    op = values[0][:5]
    has_none = "triton" not in ops.implementations(op)
    skip = pytest.mark.skipif(has_none, reason=f"{op} has no Triton kernels yet")
    return pytest.param(*values, id="-".join(map(str, values)), marks=skip)


OPS = [_param(op) for op in KERNELS]

NEWEST_ASSEMBLY = 8.8
"""What the assembler of CUDA 12.9 can read, the oldest that comes with JAX; Triton's own, which XLA
does not use, is newer."""


@pytest.mark.parametrize(
    "op,dtype,K,V",
    [
        _param(op, dtype, K, V)
        for op in KERNELS
        for dtype, widths in WIDTHS[op].items()
        for K, V in widths
    ],
)
def test_no_kernel_spills_or_takes_more_than_there_is(gpu_chip, op, dtype, K, V):
    """At the tile of the table, forward, gradient and one step; with the units of the chip."""
    unit = {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}.get(gpu_chip, "mma.sync")
    if op == "slstm":
        unit = "mma.sync"  # the only one for 16 rows, which are all that a step has
    for part in PARTS:
        T = 1 if part == "decode" else 1024
        case = Case(op=op, part=part, B=16, T=T, H=4, K=K, V=V, dtype=dtype)
        kernels = gpu_resources.kernel_resources(gpu_chip, case)
        assert {kernel.name for kernel in kernels} == KERNELS[op][part]
        for kernel in kernels:
            assert resources.complaints(gpu_chip, kernel) == []
            assert kernel.assembly <= NEWEST_ASSEMBLY
            if part == "gradient" and (K, V) == WIDTHS[op]["bfloat16"][1] and dtype == "bfloat16":
                assert kernel.matrix_unit == unit


@pytest.mark.parametrize("name", [_param(name) for name in CALLS if name not in KERNELS])
def test_the_gradient_compiles_with_every_option(name):
    _assert_gradient_compiles("sm_90", name)


@pytest.mark.parametrize("op", OPS)
def test_the_gradient_compiles(gpu_chip, op):
    _assert_gradient_compiles(gpu_chip, op)


def _assert_gradient_compiles(chip, name):
    call, args = CALLS[name]
    found = compiler.kernels(compiler.compile_for(chip, calls.gradient(call), *args))
    assert found == KERNELS[name[:5]]["gradient"]


@pytest.mark.parametrize("op", OPS)
def test_a_single_step_compiles_and_updates_a_donated_state_in_place(gpu_chip, op):
    _assert_step_is_in_place(gpu_chip, op)


@pytest.mark.parametrize("name", [_param(name) for name in STEPS if name not in KERNELS])
def test_a_single_step_is_in_place_with_every_option(name):
    _assert_step_is_in_place("sm_90", name)


def _assert_step_is_in_place(chip, name):
    """But for h of the sLSTM: programs of other cells still read the old one."""
    call, args = STEPS[name]
    number = 5 if name.startswith("mlstm") else 3
    compiled = compiler.compile_for(chip, call, *args, donate=number)
    assert compiler.kernels(compiled) == KERNELS[name[:5]]["decode"]
    largest = max(args[number], key=lambda leaf: leaf.size)
    assert compiled.memory_analysis().alias_size_in_bytes >= largest.size * 4
    sizes = ",".join(map(str, largest.shape))
    copies = re.findall(rf"= f32\[{sizes}\]\S* copy\(", compiled.as_text())
    assert len(copies) == (1 if name.startswith("slstm") else 0)


@pytest.mark.parametrize("op", OPS)
def test_on_a_mesh_no_device_communicates(op):
    """But for the sum of the recurrent weights' gradient over the batch, as for any weights."""
    mesh = compiler.mesh_of(compiler.devices("sm_90", 4), tensor=2)
    call, args = CALLS[op]
    kwargs = dict(mesh=mesh, shardings=calls.shardings(mesh, op, args))
    forward = compiler.compile_for("sm_90", call, *args, **kwargs)
    assert compiler.kernels(forward) == KERNELS[op]["forward"]
    assert not re.findall(calls.COLLECTIVES, forward.as_text())
    # The cotangents come from a loss that is local, too: none of it is summed over devices.
    backward = compiler.compile_for("sm_90", calls.pulled(call), *args, **kwargs).as_text()
    found = set(re.findall(calls.COLLECTIVES, backward))
    assert found <= ({"all-reduce"} if op == "slstm" else set())


@pytest.mark.parametrize("op", OPS)
def test_a_mapped_axis_compiles(op):
    call, args = CALLS[op]
    mapped = jax.tree.map(lambda x: calls.shape(2, *x.shape, dtype=x.dtype), args)
    found = compiler.compile_for("sm_90", jax.vmap(calls.gradient(call)), *mapped)
    assert compiler.kernels(found) == KERNELS[op]["gradient"]


@pytest.mark.parametrize("op", OPS)
def test_on_a_gpu_the_kernels_are_used_by_default(op):
    sizes = {"mlstm": (512, 256, 512), "slstm": (256, 256)}[op]
    call, args = getattr(calls, op)(*sizes, implementation="auto")
    found = compiler.kernels(compiler.compile_for("sm_90", call, *args))
    assert found == KERNELS[op]["forward"]


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_has_no_kernel_for_float16(op):
    sizes = {"mlstm": (512, 256, 512), "slstm": (256, 256)}[op]
    call, args = getattr(calls, op)(*sizes, jnp.float16, **TRITON)
    with pytest.raises(NotImplementedError, match="float16 overflows"):
        resources.launches_for("sm_90", call, *args)


def test_a_chunk_that_is_no_multiple_of_a_tile_is_refused_with_one_that_is():
    call, args = calls.mlstm(512, 256, 512, chunk_size=100, **TRITON)
    with pytest.raises(NotImplementedError, match="chunk_size=100 is not a multiple of 64.*128"):
        resources.launches_for("sm_90", call, *args)


@pytest.mark.parametrize("op", OPS)
def test_a_tpu_has_no_triton(op):
    with common.compiled_for("v5e"):
        assert "runs on a GPU" in str(ops.implementations(op)["triton"])
