"""Estimates by formula, compared with train steps compiled for up to eight CPU devices."""

import dataclasses

import pytest

from tests.plan.runs import config, cpu_target, sizes, target
from xlstm_jax.flops import count_params
from xlstm_jax.plan import plan
from xlstm_jax.plan.activations import residuals_per_device
from xlstm_jax.plan.formula import estimate
from xlstm_jax.sharding import MeshConfig


def bytes_by_kind(collectives: dict[str, tuple[int, float]]) -> dict[str, float]:
    """Bytes sent by kind; an all-reduce counts as a reduce-scatter and an all-gather.

    XLA for CPUs compiles reduce-scatters to all-reduces.
    """
    total = {kind: amount for kind, (_, amount) in collectives.items()}
    reduced = total.pop("all-reduce", 0.0) / 2
    return {
        "all-gather": total.get("all-gather", 0.0) + reduced,
        "reduce-scatter": total.get("reduce-scatter", 0.0) + reduced,
    }


def compare(mesh: MeshConfig, count: int, **changes):
    """The compiled plan of a one-block model on CPU devices, and its estimate."""
    cfg = config(mesh, seq_len=32, **({"pattern": "M", "dtype": "float32"} | changes))
    devices = cpu_target(count)
    return plan(cfg, devices), estimate(cfg, devices, cfg.mesh.sizes(count))


@pytest.mark.slow
def test_sharded_state_and_its_collectives_match_the_compiled_step():
    mesh = MeshConfig(fsdp=4, min_shard_size=1024)
    compiled, formula = compare(mesh, 4, remat="full")
    assert formula.params_bytes == compiled.params_bytes
    assert formula.optimizer_bytes == compiled.optimizer_bytes
    # Embedding and head are gathered once, the block twice; each gradient is reduce-scattered once.
    compiled_bytes = bytes_by_kind(compiled.collectives)
    assert formula.bytes_sent["reduce-scatter"] == pytest.approx(
        compiled_bytes["reduce-scatter"], rel=0.03
    )
    gathered = compiled.collectives["all-gather"][1]
    assert formula.bytes_sent["all-gather"] == pytest.approx(gathered, rel=0.03)
    assert compiled.peak_bytes > compiled.params_bytes + compiled.optimizer_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, count, tolerance",
    [
        (MeshConfig(seq=4), 4, 0.03),
        (MeshConfig(tensor=2), 2, 0.2),  # a lower bound: XLA does not combine all input gradients
    ],
    ids=["seq", "tensor"],
)
def test_total_bytes_sent_are_close_to_the_compiled_step(mesh, count, tolerance):
    compiled, formula = compare(mesh, count, remat="full")
    total = sum(amount for _, amount in compiled.collectives.values())
    assert sum(formula.bytes_sent.values()) == pytest.approx(total, rel=tolerance)
    assert formula.params_bytes == compiled.params_bytes


def test_accumulation_repeats_all_gathers_but_reduces_the_embedding_gradient_once():
    cfg = config(MeshConfig(fsdp=4))
    twice = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accumulation=2))
    one, two = (estimate(c, target(), sizes(fsdp=4)).bytes_sent for c in (cfg, twice))
    assert two["all-gather"] == 2 * one["all-gather"]
    assert one["reduce-scatter"] < two["reduce-scatter"] < 2 * one["reduce-scatter"]


def test_parameters_below_min_shard_size_are_replicated():
    replicated, sharded = (
        estimate(config(MeshConfig(fsdp=8, min_shard_size=min_shard_size)), target(), sizes(fsdp=8))
        for min_shard_size in (2**40, 1)
    )
    assert replicated.params_bytes == 4 * count_params(config().model)
    assert 8 * sharded.params_bytes == pytest.approx(replicated.params_bytes, rel=0.01)


def test_states_are_all_gathered_over_seq_and_their_gradients_reduce_scattered():
    one, two = (
        estimate(config(MeshConfig(seq=2), batch_size=b), target(), sizes(seq=2)).bytes_sent
        for b in (1, 2)
    )
    # C, n and m of four heads in float32, in four blocks, sent to one other device.
    state = 4 * 4 * (32 * 64 + 32 + 1) * 4
    assert two["all-gather"] - one["all-gather"] == state
    assert two["reduce-scatter"] - one["reduce-scatter"] == state


def test_groups_across_hosts_use_the_inter_host_network():
    cfg, chip = config(MeshConfig(fsdp=8)), target().chip
    intra = estimate(cfg, target(), sizes(fsdp=8))
    inter = estimate(cfg, target(intra_size=4), sizes(fsdp=8))
    assert inter.bytes_sent == intra.bytes_sent
    ratio = chip.intra_bandwidth / chip.inter_bandwidth
    assert inter.network_seconds / intra.network_seconds == pytest.approx(ratio)


def test_residuals_scale_with_the_batch_and_cast_parameters_do_not():
    small, large = (
        residuals_per_device(config(batch_size=b, remat="full"), sizes(), "cpu") for b in (2, 6)
    )
    assert large[0] == 3 * small[0] and large[1] == small[1] > 0
    # At least the input of every block, in bfloat16.
    assert small[0] >= 2 * 4 * 256 * 256 * 2
    sharded = residuals_per_device(
        config(MeshConfig(fsdp=2, seq=2), batch_size=6, remat="full"), sizes(fsdp=2, seq=2), "cpu"
    )
    assert sharded == (large[0] // 4, large[1] // 2)
    tensor_sharded = residuals_per_device(
        config(MeshConfig(tensor=2), batch_size=6, remat="full"), sizes(tensor=2), "cpu"
    )
    assert tensor_sharded == (large[0] // 2, large[1] // 2)
    not_rematerialized = residuals_per_device(config(batch_size=2, remat="none"), sizes(), "cpu")
    assert not_rematerialized[0] > 4 * small[0]
