"""Every Triton kernel, forward and gradient, compiles for every chip without register spills."""

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
    "mlstm, sigmoid, no normalizer": calls.mlstm(
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


NEWEST_PTX = 8.8
"""Newest PTX version that ptxas of CUDA 12.9, the oldest that comes with JAX, can read. XLA does
not use the newer ptxas of Triton's wheel."""


@pytest.mark.parametrize(
    "op,dtype,K,V",
    [
        (op, dtype, K, V)
        for op in KERNELS
        for dtype, widths in WIDTHS[op].items()
        for K, V in widths
    ],
)
def test_no_kernel_spills_registers_or_exceeds_shared_memory(gpu_chip, op, dtype, K, V):
    """Forward, gradient and decoding at the default tile, with the chip's matrix instruction."""
    unit = {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}.get(gpu_chip, "mma.sync")
    if op == "slstm":
        unit = "mma.sync"  # the only instruction for M = 16, the sequences of one program
    for part in PARTS:
        T = 1 if part == "decode" else 1024
        case = Case(op=op, part=part, B=16, T=T, H=4, K=K, V=V, dtype=dtype)
        kernels = gpu_resources.kernel_resources(gpu_chip, case)
        assert {kernel.name for kernel in kernels} == KERNELS[op][part]
        for kernel in kernels:
            assert resources.exceeded_limits(gpu_chip, kernel) == []
            assert kernel.ptx_version <= NEWEST_PTX
            if part == "gradient" and (K, V) == WIDTHS[op]["bfloat16"][1] and dtype == "bfloat16":
                assert kernel.matrix_unit == unit


@pytest.mark.parametrize("name", [name for name in CALLS if name not in KERNELS])
def test_gradient_compiles_with_every_option(name):
    _assert_gradient_compiles("sm_90", name)


@pytest.mark.parametrize("op", KERNELS)
def test_gradient_compiles(gpu_chip, op):
    _assert_gradient_compiles(gpu_chip, op)


def _assert_gradient_compiles(chip, name):
    call, args = CALLS[name]
    compiled = compiler.compile_for(chip, calls.gradient(call), *args)
    assert compiler.kernels(compiled) == KERNELS[name[:5]]["gradient"]


@pytest.mark.parametrize("op", KERNELS)
def test_decoding_step_reuses_a_donated_state(gpu_chip, op):
    _assert_state_is_reused(gpu_chip, op)


@pytest.mark.parametrize("name", [name for name in STEPS if name not in KERNELS])
def test_decoding_step_reuses_a_donated_state_with_every_option(name):
    _assert_state_is_reused("sm_90", name)


def _assert_state_is_reused(chip, name):
    """Except for h of the sLSTM: programs of other cells still read the old one."""
    call, args = STEPS[name]
    state = 5 if name.startswith("mlstm") else 3
    compiled = compiler.compile_for(chip, call, *args, donate=state)
    assert compiler.kernels(compiled) == KERNELS[name[:5]]["decode"]
    largest = max(args[state], key=lambda leaf: leaf.size)
    assert compiled.memory_analysis().alias_size_in_bytes >= largest.size * 4
    sizes = ",".join(map(str, largest.shape))
    copies = re.findall(rf"= f32\[{sizes}\]\S* copy\(", compiled.as_text())
    assert len(copies) == (1 if name.startswith("slstm") else 0)


@pytest.mark.parametrize("op", KERNELS)
def test_kernels_on_a_mesh_need_no_collectives(op):
    """Except for the gradient of the recurrent weights, which is summed over the batch."""
    mesh = compiler.make_mesh(compiler.devices("sm_90", 4), tensor=2)
    call, args = CALLS[op]
    kwargs = dict(mesh=mesh, shardings=calls.shardings(mesh, op, args))
    forward = compiler.compile_for("sm_90", call, *args, **kwargs)
    assert compiler.kernels(forward) == KERNELS[op]["forward"]
    assert not re.findall(calls.COLLECTIVES, forward.as_text())
    backward = compiler.compile_for("sm_90", calls.pullback(call), *args, **kwargs).as_text()
    collectives = set(re.findall(calls.COLLECTIVES, backward))
    assert collectives <= ({"all-reduce"} if op == "slstm" else set())


@pytest.mark.parametrize("op", KERNELS)
def test_vmap_of_the_gradient_compiles(op):
    call, args = CALLS[op]
    mapped = jax.tree.map(lambda x: calls.shape(2, *x.shape, dtype=x.dtype), args)
    compiled = compiler.compile_for("sm_90", jax.vmap(calls.gradient(call)), *mapped)
    assert compiler.kernels(compiled) == KERNELS[op]["gradient"]


@pytest.mark.parametrize("op", KERNELS)
def test_kernels_are_used_by_default_on_a_gpu(op):
    sizes = {"mlstm": (512, 256, 512), "slstm": (256, 256)}[op]
    call, args = getattr(calls, op)(*sizes, implementation="auto")
    compiled = compiler.compile_for("sm_90", call, *args)
    assert compiler.kernels(compiled) == KERNELS[op]["forward"]


@pytest.mark.parametrize("op", KERNELS)
def test_float16_is_not_supported(op):
    sizes = {"mlstm": (512, 256, 512), "slstm": (256, 256)}[op]
    call, args = getattr(calls, op)(*sizes, jnp.float16, **TRITON)
    with pytest.raises(NotImplementedError, match="float16 overflows"):
        resources.launches_for("sm_90", call, *args)


def test_error_for_an_unaligned_chunk_size_names_an_aligned_one():
    call, args = calls.mlstm(512, 256, 512, chunk_size=100, **TRITON)
    with pytest.raises(NotImplementedError, match="chunk_size=100 is not a multiple of 64.*128"):
        resources.launches_for("sm_90", call, *args)


@pytest.mark.parametrize("op", KERNELS)
def test_triton_is_not_supported_on_a_tpu(op):
    with common.compiled_for("v5e"):
        assert "runs on a GPU" in str(ops.implementations(op)["triton"])
