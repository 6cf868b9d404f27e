"""Full train steps, compiled for TPU pods by `xlstm_jax.plan`."""

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


def config(preset, mesh, batch_size, seq_len, **model):
    """A preset with full rematerialization on this mesh and batch."""
    cfg = experiment_from_preset(preset)
    data = dataclasses.replace(cfg.data, batch_size=batch_size, seq_len=seq_len)
    model = dataclasses.replace(cfg.model, remat="full", **model)
    return dataclasses.replace(cfg, model=model, data=data, mesh=mesh)


def test_1_4b_step_fits_sixteen_chips_with_a_fully_sharded_state():
    cfg = config("scaling_1.4b", MeshConfig(fsdp=16), 16, 2048)
    target = find_target("v5e:4x4")
    result = plan(cfg, target)
    # Weights and both moments are sharded over all chips; norms and gate biases are replicated.
    state_bytes = result.params_bytes + result.optimizer_bytes
    assert state_bytes < 1.01 * 12 * result.num_params / 16
    assert result.fits and result.peak_bytes < 4 << 30
    assert result.peak_bytes > state_bytes + result.activations_bytes


@pytest.mark.slow
def test_a_sequence_of_a_million_tokens_fits_under_sequence_parallelism():
    cfg = config("scaling_1.4b", MeshConfig(seq=16), 1, 2**20)
    result = plan(cfg, find_target("v5p:2x2x4"))
    assert result.fits and result.peak_bytes < 50 << 30
    # 48 state summaries of each of 16 shards, forward and rematerialized, of any sequence length.
    assert result.collectives["all-gather"][1] < 2 << 30


@pytest.fixture(scope="module")
def compiled():
    """The step of four layers as wide as those of the 7B model, sharded over data and fsdp."""
    cfg = config("xlstm_7b", MeshConfig(fsdp=8), 16, 1024, pattern="MMMM")
    return compile_step(cfg, find_target("v5e:4x4"))[1]


@pytest.fixture(scope="module")
def program(compiled):
    """The HLO of that step."""
    return Program(str(compiled.as_text()))


def test_step_contains_the_kernels(compiled):
    assert compiler.kernels(compiled) == {"mlstm_forward", "mlstm_backward"}


def test_parameters_are_all_gathered_in_the_dtype_of_activations(program):
    large = [c for c in collectives(program) if c.payload > 2**20]
    gathers = [c for c in large if c.kind == "all-gather"]
    assert len(gathers) >= 6 and {c.dtype for c in gathers} == {"bf16"}
    assert {c.count for c in gathers} == {1, 4}  # embedding tables, and blocks


def test_gradients_of_blocks_are_reduce_scattered_before_the_all_reduce(program):
    """The all-reduce over data handles only the local shard."""
    blocks = [c for c in collectives(program) if c.count == 4 and c.payload > 2**20]
    assert {"all-gather", "reduce-scatter", "all-reduce"} <= {c.kind for c in blocks}
    largest = max(c.payload for c in blocks if c.kind == "reduce-scatter")
    assert largest == 4096 * 21888 * 2
    reduced = sum(c.payload for c in blocks if c.kind == "all-reduce")
    shards = sum(c.payload for c in blocks if c.kind == "reduce-scatter") / 8
    assert reduced == pytest.approx(shards, rel=0.05)


def test_only_gradient_shards_cross_the_network_between_slices():
    cfg = config("scaling_160m", MeshConfig(fsdp=16), 32, 512, pattern="MM")
    target = find_target("v5e:4x4", slices=2)
    assert (target.num_devices, target.intra_size, len(target.devices)) == (32, 16, 32)
    program, compiled = compile_step(cfg, target)
    assert dict(program.devices.mesh.shape) == {"data": 2, "fsdp": 16, "seq": 1, "tensor": 1}
    inter_slice = [
        c
        for c in collectives(Program(str(compiled.as_text())))
        if len({device // 16 for device in c.group}) > 1 and c.payload > 2**16
    ]
    assert inter_slice
    assert {c.kind for c in inter_slice} <= {"all-reduce", "all-gather", "reduce-scatter"}
    # A sixteenth of all parameters: two embedding tables and two blocks.
    payload = sum(c.payload * c.count for c in inter_slice)
    assert payload < 1.2 * 4 * count_params(cfg.model) / 16
