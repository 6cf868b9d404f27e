"""Full train steps, compiled for GPU clusters by `xlstm_jax.plan`."""

import dataclasses

import pytest

from pallas_kernels.aot import compiler
from tests.compile import calls
from xlstm_jax.cli.options import experiment_from_preset
from xlstm_jax.plan import find_target, plan
from xlstm_jax.plan.collectives import collectives
from xlstm_jax.plan.formula import estimate
from xlstm_jax.plan.hlo import Program
from xlstm_jax.plan.report import compile_step
from xlstm_jax.sharding import MeshConfig


def config_7b(batch_size, mesh):
    """xLSTM 7B with the sequence length of its paper and full rematerialization."""
    cfg = experiment_from_preset("xlstm_7b")
    data = dataclasses.replace(cfg.data, batch_size=batch_size, seq_len=8192)
    model = dataclasses.replace(cfg.model, remat="full")
    return dataclasses.replace(cfg, model=model, data=data, mesh=mesh)


def test_7b_model_with_the_batch_size_of_its_paper_fits_256_gpus():
    """256 GPUs, data 32 x fsdp 8, two sequences of 8,192 tokens on each."""
    result = plan(config_7b(512, MeshConfig(data=32, fsdp=8)), find_target("h100:32x8"))
    assert result.num_chips == 256 and result.tokens_per_step == 512 * 8192
    assert result.fits and result.peak_bytes < 32 << 30
    assert result.limit == "compute"
    assert result.params_bytes + result.optimizer_bytes < 1.01 * 12 * result.num_params / 8


def test_step_contains_the_triton_kernels_and_all_gathers_weights_in_bfloat16():
    _, compiled = compile_step(config_7b(8, MeshConfig(fsdp=8)), find_target("h100:1x8"))
    assert compiler.kernels(compiled) == calls.TRITON_GRADIENT
    large = [c for c in collectives(Program(str(compiled.as_text()))) if c.payload > 2**20]
    assert {c.dtype for c in large if c.kind == "all-gather"} == {"bf16"}
    assert sum(c.count for c in large if c.kind == "reduce-scatter") >= 3 * 32
    assert not [c for c in large if c.kind == "all-reduce"]


@pytest.mark.parametrize("topology", ["h100:1x8", "h100:2x8"])
def test_formula_estimate_is_close_to_the_compiled_step(topology):
    cfg = config_7b(16, MeshConfig(fsdp=8))
    model = dataclasses.replace(cfg.model, pattern="MM")
    data = dataclasses.replace(cfg.data, seq_len=512)
    cfg = dataclasses.replace(cfg, model=model, data=data)
    target = find_target(topology)
    compiled = plan(cfg, target)
    formula = estimate(cfg, target, compiled.mesh)
    assert formula.params_bytes == compiled.params_bytes
    assert formula.optimizer_bytes == compiled.optimizer_bytes
    sent = sum(amount for _, amount in compiled.collectives.values())
    assert sum(formula.bytes_sent.values()) == pytest.approx(sent, rel=0.1)
