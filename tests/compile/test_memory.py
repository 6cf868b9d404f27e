"""Calls that exceed VMEM are rejected before lowering, or the compiler's error names a fix."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import tpu_tiles
from pallas_kernels.aot import compiler
from pallas_kernels.mlstm import tpu_tiles as tiles
from pallas_kernels.mlstm.tpu_tiles import Tile
from tests.compile import calls


def test_error_for_a_head_that_exceeds_vmem_names_a_width_that_fits():
    call, args = calls.mlstm(256, 4096, 4096)
    with pytest.raises(NotImplementedError, match=r"K=4096.*MiB.*v5e has 128 MiB.*fits"):
        compiler.compile_for("v5e", call, *args)


def test_compiler_error_on_vmem_overflow_names_a_chunk_size_that_fits(monkeypatch):
    monkeypatch.setattr(Tile, "vmem_limit", lambda *args: 1 << 20)
    fn, shapes, _ = tpu_tiles.calls(Tile(512, 128, 1), 256, 512)["mlstm_backward"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="chunk_size=256"):
        compiler.compile_for("v5e", fn, *shapes)


@pytest.mark.parametrize("name", ["mlstm_forward", "mlstm_backward"])
@pytest.mark.parametrize("dtype", [jnp.dtype("bfloat16"), jnp.dtype("float32")], ids=str)
@pytest.mark.parametrize(
    "K,V", [(64, 128), (256, 512), pytest.param(1024, 1024, marks=pytest.mark.slow)]
)
def test_kernels_compile_within_the_vmem_estimate(monkeypatch, chip, K, V, dtype, name):
    """At the default tile, with exactly the estimate as the limit."""
    monkeypatch.setattr(Tile, "vmem_limit", tiles.vmem_bytes)
    refusal = tiles.refusal(K, V, dtype, chip=chip)
    if refusal is not None:
        assert (chip, K) == ("v4", 1024)
        return
    tile = tiles.choose(K, V, dtype, 8192, None, chip)
    fn, shapes, _ = tpu_tiles.calls(tile, K, V, dtype)[name]
    assert compiler.kernels(compiler.compile_for(chip, fn, *shapes)) == {name}
