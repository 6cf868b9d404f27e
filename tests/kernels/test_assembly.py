"""Parsers of the assembly of GPU kernels, on small examples."""

import pytest

from experiments.benchmarks import gpu_cycles
from pallas_kernels.aot import mosaic, sass

PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, {left}, gdesc[UR8], R24 ;"


def code(*instructions: str) -> str:
    """Lines of a disassembly; labels start with a dot."""
    return "\n".join(
        f"{x}:" if x.startswith(".") else f"        /*{16 * i:04x}*/    {x}"
        for i, x in enumerate(instructions)
    )


def test_loops_have_their_own_instructions_and_cycles():
    inner = [".L_x_2", *["FADD R1, R2, R3 ;"] * 20, "@P0 BRA `(.L_x_2) ;"]
    outer = [".L_x_1", *["MOV R1, R2 ;"] * 3, *inner, PRODUCT.format(left="gdesc[UR4]")]
    text = code("MOV R1, R2 ;", *outer, "@P1 BRA `(.L_x_1) ;", "EXIT ;")
    assert [tuple(loop) for loop in sass.loops(text)] == [(0, 2, 0.0), (1, 5, 32.0), (2, 21, 0.0)]


def test_loops_that_only_wait_are_not_loops():
    text = code(".L_x_1", "SYNCS.PHASECHK P0 ;", "@!P0 BRA `(.L_x_1) ;", "EXIT ;")
    assert [tuple(loop) for loop in sass.loops(text)] == [(0, 3, 0.0)]


@pytest.mark.parametrize("N,smem,registers", [(16, 20, 8), (64, 32, 32), (256, 128, 128)])
def test_cycles_of_a_product(N, smem, registers):
    for left, cycles in (("gdesc[UR4]", smem), ("R4", registers)):
        text = code(PRODUCT.format(left=left).replace("64x64", f"64x{N}"))
        assert sass.loops(text)[0].product_cycles == cycles


KERNEL = """
{store}
{fence}
$L__BB0_1:
    wgmma.mma_async.sync.aligned.m64n64k16 ;
    @%p1 bra $L__BB0_2;
    wgmma.mma_async.sync.aligned.m64n8k16 ;
$L__BB0_2:
{wait}
    mbarrier.arrive.release.cta.shared::cta.b64 _, [%r1], 1;
    @%p2 bra $L__BB0_1;
"""


def kernel(store="st.shared.b32 [%r1], %r2;", fence="fence.proxy.async;", wait=None) -> str:
    wait = "wgmma.wait_group.sync.aligned 0;" if wait is None else wait
    return KERNEL.format(store=store, fence=fence, wait=wait)


def test_missing_wait_and_fence_are_detected_on_every_path():
    assert mosaic.unawaited_products(kernel()) == mosaic.unfenced_products(kernel()) == []
    assert mosaic.unawaited_products(kernel(wait="")) == [
        "mbarrier.arrive.release.cta.shared::cta.b64 _, [%r1], 1;"
    ]
    assert len(mosaic.unfenced_products(kernel(fence=""))) == 2
    assert mosaic.unfenced_products(kernel(fence="", store="")) == []


def test_counts_of_mosaic_kernels_are_those_of_their_products():
    """Per 64 positions at (256, 512): two parts of h, each with all products of positions."""
    counts = {one.kernel: one for one in gpu_cycles.mosaic_counts(gpu_cycles.Arguments())}
    state, positions = 4 * 4 * 128, 2.5 * (4 + 4) * 128
    assert counts["h"].tensor == 2 * (state + positions)
    assert counts["states"].l2 == 2 * 64 * 64 * 4 * 8 * 2 / 2
    assert counts["dq"].tensor == 8 * 4 * 128 + 2.5 * (8 + 4) * 128


def test_loops_with_parts_out_of_line_are_detected():
    """A wait whose code follows the exit jumps back into its loop."""
    body = [".L_x_1", *["FADD R1, R2, R3 ;"] * 20, "@!P1 BRA `(.L_x_2) ;", ".L_x_3", "NOP ;"]
    wait = [".L_x_2", "SYNCS.PHASECHK P1 ;", "@!P1 BRA `(.L_x_2) ;", "BRA `(.L_x_3) ;"]
    text = code("NOP ;", *body, "@P0 BRA `(.L_x_1) ;", "EXIT ;", *wait, ".L_x_4", "NOP ;")
    assert [tuple(loop) for loop in sass.loops(text)] == [(0, 3, 0.0), (1, 26, 0.0)]
