"""Whole steps of training, compiled for pods by `xlstm_jax.plan`."""

import dataclasses

import pytest

from pallas_kernels.aot import compiler
from xlstm_jax.cli.options import experiment_from_preset
from xlstm_jax.flops import count_params
from xlstm_jax.plan import find_target, plan
from xlstm_jax.plan.collectives import collectives
from xlstm_jax.plan.hlo import Program
from xlstm_jax.plan.report import compile_step
from xlstm_jax.sharding import MeshConfig


def config(preset, mesh, rows, seq_len, **model):
    cfg = experiment_from_preset(preset)
    data = dataclasses.replace(cfg.data, batch_size=rows, seq_len=seq_len)
    model = dataclasses.replace(cfg.model, remat="full", **model)
    return dataclasses.replace(cfg, model=model, data=data, mesh=mesh)


def test_a_step_of_the_1_4b_model_fits_sixteen_chips_and_holds_nothing_whole():
    cfg = config("scaling_1.4b", MeshConfig(fsdp=16), 16, 2048)
    target = find_target("v5e:4x4")
    result = plan(cfg, target)
    # Weights and both moments, cut over all chips; norms and gate biases alone are held whole.
    state = 12 * result.num_params
    assert result.params_bytes + result.optimizer_bytes < 1.01 * state / 16
    assert result.fits and result.peak_bytes < 4 << 30
    held = result.params_bytes + result.optimizer_bytes
    assert result.peak_bytes > held + result.activations_bytes


@pytest.mark.slow
def test_rows_of_a_million_tokens_fit_chips_that_share_them():
    cfg = config("scaling_1.4b", MeshConfig(seq=16), 1, 2**20)
    result = plan(cfg, find_target("v5p:2x2x4"))
    assert result.fits and result.peak_bytes < 50 << 30
    # 48 summaries, forward and again, of each of 16 spans; nothing that grows with the row.
    assert result.collectives["all-gather"][1] < 2 << 30


@pytest.fixture(scope="module")
def compiled():
    """Four layers as wide as those of the 7B model, under data and fsdp."""
    cfg = config("xlstm_7b", MeshConfig(fsdp=8), 16, 1024, pattern="MMMM")
    return compile_step(cfg, find_target("v5e:4x4"))[1]


@pytest.fixture(scope="module")
def program(compiled):
    return Program(str(compiled.as_text()))


def test_the_kernels_are_inside(compiled):
    assert compiler.kernels(compiled) == {"mlstm_forward", "mlstm_backward"}


def test_parameters_travel_in_the_dtype_of_activations(program):
    """Everything that is gathered and large; the gradients of blocks come back in it as well."""
    large = [c for c in collectives(program) if c.payload > 2**20]
    gathered = [c for c in large if c.kind == "all-gather"]
    assert len(gathered) >= 6 and {c.dtype for c in gathered} == {"bf16"}
    assert {c.count for c in gathered} == {1, 4}  # tables, and blocks


def test_no_chip_adds_up_gradients_of_blocks_that_it_keeps_a_part_of(program):
    """What is added up whole, along data, is no larger than that part."""
    blocks = [c for c in collectives(program) if c.count == 4 and c.payload > 2**20]
    assert {"all-gather", "reduce-scatter", "all-reduce"} <= {c.kind for c in blocks}
    largest = max(c.payload for c in blocks if c.kind == "reduce-scatter")
    assert largest == 4096 * 21888 * 2
    whole = sum(c.payload for c in blocks if c.kind == "all-reduce")
    parts = sum(c.payload for c in blocks if c.kind == "reduce-scatter") / 8
    assert whole == pytest.approx(parts, rel=0.05)


def test_only_parts_of_gradients_cross_the_network_between_slices():
    cfg = config("scaling_160m", MeshConfig(fsdp=16), 32, 512, pattern="MM")
    target = find_target("v5e:4x4", slices=2)
    assert (target.num_devices, target.intra_size, len(target.devices)) == (32, 16, 32)
    program, compiled = compile_step(cfg, target)
    assert dict(program.devices.mesh.shape) == {"data": 2, "fsdp": 16, "seq": 1, "tensor": 1}
    far = [
        c
        for c in collectives(Program(str(compiled.as_text())))
        if len({device // 16 for device in c.group}) > 1 and c.payload > 2**16
    ]
    assert far and {c.kind for c in far} <= {"all-reduce", "all-gather", "reduce-scatter"}
    # Two tables and two blocks, a sixteenth of each.
    assert sum(c.payload * c.count for c in far) < 1.2 * 4 * count_params(cfg.model) / 16
