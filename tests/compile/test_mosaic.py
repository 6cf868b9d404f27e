"""Every Mosaic GPU kernel compiles for Hopper without register spills, and awaits its products."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import mosaic
from pallas_kernels.aot import compiler
from pallas_kernels.aot import mosaic as aot
from pallas_kernels.hardware import ARCHITECTURES
from tests.compile import calls

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < mosaic.MIN_JAX, reason="Mosaic GPU kernels need a newer jax"
)

MOSAIC = dict(implementation="mosaic_gpu")
GRADIENT = {f"mlstm_{x}" for x in ("states", "h", "dstates", "dq", "dk", "dv")}
WIDTHS = [(64, 128), (128, 128), (128, 256), (256, 512)]


@functools.cache
def kernels(K: int, V: int) -> list[aot.Resources]:
    """The kernels of a call with resets and masks, and of its gradient."""
    call, args = calls.mlstm(1024, K, V, flags=True, **MOSAIC)
    return aot.resources("sm_90", calls.gradient(call), *args)


@pytest.mark.parametrize("K,V", WIDTHS)
def test_no_kernel_spills_registers_or_exceeds_shared_memory(K, V):
    assert {kernel.name for kernel in kernels(K, V)} == GRADIENT
    for kernel in kernels(K, V):
        assert kernel.spills == 0, kernel.name
        assert kernel.shared_bytes < ARCHITECTURES["sm_90"].shared_bytes - 1024, kernel.name
        assert kernel.registers <= 255, kernel.name


@pytest.mark.parametrize("K,V", WIDTHS)
def test_kernels_use_warp_group_products_and_bulk_copies(K, V):
    for kernel in kernels(K, V):
        assert "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16" in kernel.ptx
        assert "cp.async.bulk.tensor" in kernel.ptx
        assert "mbarrier.try_wait" in kernel.ptx


@pytest.mark.parametrize("K,V", WIDTHS)
def test_products_are_awaited_and_their_operands_fenced(K, V):
    for kernel in kernels(K, V):
        assert aot.unawaited_products(kernel.ptx) == [], kernel.name
        assert aot.unfenced_products(kernel.ptx) == [], kernel.name


@pytest.mark.parametrize(
    "instruction,find",
    [
        (r"wgmma\.wait_group\.sync\.aligned\s+0", aot.unawaited_products),
        (r"fence\.proxy\.async", aot.unfenced_products),
    ],
    ids=["wait", "fence"],
)
def test_a_missing_instruction_is_detected(instruction, find):
    """At least one in every kernel; some are repeated before anything depends on them."""
    for kernel in kernels(256, 512):
        lines = re.finditer(rf".*{instruction}.*\n", kernel.ptx)
        broken = [kernel.ptx[: line.start()] + kernel.ptx[line.end() :] for line in lines]
        assert any(find(ptx) for ptx in broken), kernel.name


def test_odd_sizes_and_other_gates_compile():
    call, args = calls.mlstm(300, 40, 96, input_gate="sigmoid", normalize=False, **MOSAIC)
    assert {kernel.name for kernel in aot.resources("sm_90", calls.gradient(call), *args)} == (
        GRADIENT
    )


def test_vmap_of_the_gradient_compiles():
    call, args = calls.mlstm(256, 64, 64, **MOSAIC)
    mapped = jax.tree.map(lambda x: calls.shape(2, *x.shape, dtype=x.dtype), args)
    compiled = aot.resources("sm_90", jax.vmap(calls.gradient(call)), *mapped)
    assert {kernel.name for kernel in compiled} == GRADIENT


@pytest.mark.parametrize("other", ["sm_80", "sm_100"])
def test_other_chips_are_refused(other):
    call, args = calls.mlstm(256, 64, 64, **MOSAIC)
    with pytest.raises(NotImplementedError, match=r"needs a Hopper GPU \(sm_90\), not " + other):
        compiler.compile_for(other, call, *args)


def test_float32_is_refused():
    call, args = calls.mlstm(256, 64, 64, jnp.float32, **MOSAIC)
    with pytest.raises(NotImplementedError, match="compute with bfloat16, not with float32"):
        compiler.compile_for("sm_90", call, *args)
