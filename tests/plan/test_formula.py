"""State and communication by formula, against train steps compiled for eight CPU devices."""

import dataclasses

import pytest

from tests.plan.runs import config, cpu_target, sizes, target
from xlstm_jax.flops import count_params
from xlstm_jax.plan import plan
from xlstm_jax.plan.activations import residuals_per_device
from xlstm_jax.plan.formula import estimate
from xlstm_jax.sharding import MeshConfig


def sent(collectives: dict[str, tuple[int, float]]) -> dict[str, float]:
    """Bytes by kind, with all-reduces as the reduce-scatter and all-gather that they consist of:
    XLA for CPUs scatters nothing."""
    total = {kind: amount for kind, (_, amount) in collectives.items()}
    reduced = total.pop("all-reduce", 0.0) / 2
    return {
        "all-gather": total.get("all-gather", 0.0) + reduced,
        "reduce-scatter": total.get("reduce-scatter", 0.0) + reduced,
    }


def compare(mesh: MeshConfig, count: int, **changes):
    """The compiled plan of a one-block model on CPU devices, and its estimate."""
    cfg = config(mesh, seq_len=32, **({"pattern": "M", "dtype": "float32"} | changes))
    of = cpu_target(count)
    return plan(cfg, of), estimate(cfg, of, cfg.mesh.sizes(count))


def test_sharded_state_and_its_communication_are_those_of_the_compiled_step():
    mesh = MeshConfig(fsdp=4, min_shard_size=1024)
    compiled, formula = compare(mesh, 4, remat="full")
    assert formula.params_bytes == compiled.params_bytes
    assert formula.optimizer_bytes == compiled.optimizer_bytes
    # The embedding and head are gathered once, the block twice; every gradient is scattered once.
    measured = sent(compiled.collectives)
    assert formula.sent["reduce-scatter"] == pytest.approx(measured["reduce-scatter"], rel=0.03)
    gathered = compiled.collectives["all-gather"][1]
    assert formula.sent["all-gather"] == pytest.approx(gathered, rel=0.03)
    assert compiled.peak_bytes > compiled.params_bytes + compiled.optimizer_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, count, tolerance",
    [
        (MeshConfig(seq=4), 4, 0.03),
        (MeshConfig(tensor=2), 2, 0.2),  # a lower bound: not all gradients of an input are joined
    ],
    ids=["seq", "tensor"],
)
def test_total_communication_is_close_to_the_compiled_step(mesh, count, tolerance):
    compiled, formula = compare(mesh, count, remat="full")
    total = sum(amount for _, amount in compiled.collectives.values())
    assert sum(formula.sent.values()) == pytest.approx(total, rel=tolerance)
    assert formula.params_bytes == compiled.params_bytes


def test_accumulation_gathers_again_but_sums_the_embedding_gradient_once():
    cfg = config(MeshConfig(fsdp=4))
    twice = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accumulation=2))
    one, two = (estimate(c, target(), sizes(fsdp=4)).sent for c in (cfg, twice))
    assert two["all-gather"] == 2 * one["all-gather"]
    assert one["reduce-scatter"] < two["reduce-scatter"] < 2 * one["reduce-scatter"]


def test_parameters_below_the_smallest_shard_size_are_replicated():
    whole, small = (
        estimate(config(MeshConfig(fsdp=8, min_shard_size=least)), target(), sizes(fsdp=8))
        for least in (2**40, 1)
    )
    assert whole.params_bytes == 4 * count_params(config().model)
    assert 8 * small.params_bytes == pytest.approx(whole.params_bytes, rel=0.01)


def test_devices_along_seq_gather_states_and_scatter_their_gradients():
    one, two = (
        estimate(config(MeshConfig(seq=2), batch_size=b), target(), sizes(seq=2)).sent
        for b in (1, 2)
    )
    # Four heads of C, n and m in float32 in each of four blocks, to one other device.
    state = 4 * 4 * (32 * 64 + 32 + 1) * 4
    assert two["all-gather"] - one["all-gather"] == state
    assert two["reduce-scatter"] - one["reduce-scatter"] == state


def test_groups_across_hosts_use_the_slower_network():
    cfg, chip = config(MeshConfig(fsdp=8)), target().chip
    intra = estimate(cfg, target(), sizes(fsdp=8))
    inter = estimate(cfg, target(intra_size=4), sizes(fsdp=8))
    assert inter.sent == intra.sent
    ratio = chip.intra_bandwidth / chip.inter_bandwidth
    assert inter.network_seconds / intra.network_seconds == pytest.approx(ratio)


def test_residuals_grow_with_the_batch_and_cast_parameters_do_not():
    few, many = (
        residuals_per_device(config(batch_size=b, remat="full"), sizes(), "cpu") for b in (2, 6)
    )
    assert many[0] == 3 * few[0] and many[1] == few[1] > 0
    # At least the input of every block, in bfloat16.
    assert few[0] >= 2 * 4 * 256 * 256 * 2
    sharded = residuals_per_device(
        config(MeshConfig(fsdp=2, seq=2), batch_size=6, remat="full"), sizes(fsdp=2, seq=2), "cpu"
    )
    assert sharded == (many[0] // 4, many[1] // 2)
    over_features = residuals_per_device(
        config(MeshConfig(tensor=2), batch_size=6, remat="full"), sizes(tensor=2), "cpu"
    )
    assert over_features == (many[0] // 2, many[1] // 2)
    none = residuals_per_device(config(batch_size=2, remat="none"), sizes(), "cpu")
    assert none[0] > 4 * few[0]
