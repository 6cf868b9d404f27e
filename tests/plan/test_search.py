"""Plans by formula, and the search for the fastest configuration that fits."""

import dataclasses
import sys

import pytest

from tests.plan.runs import config, sizes, target
from xlstm_jax.config import ConfigError
from xlstm_jax.plan import find_target, plan, search
from xlstm_jax.plan.report import estimated_plan
from xlstm_jax.plan.search import SEQUENCES_PER_DEVICE, candidates
from xlstm_jax.sharding import MeshConfig

MIB = 2**20


def test_plan_without_a_compiler_gives_the_reason_and_lower_bounds():
    result = plan(config(MeshConfig(fsdp=4)), target())
    assert result.refusal == "for the test" and result.compile_seconds == 0
    assert set(result.seconds) == {"compute", "network"}
    # Parameters, two moments and gradients.
    assert result.peak_bytes > 4 * result.params_bytes
    assert result.mesh == sizes(data=2, fsdp=4)
    with pytest.raises(ConfigError, match="data.batch_size must be a multiple of 8"):
        plan(config(MeshConfig(fsdp=4), batch_size=9), target())


def test_limit_is_the_resource_with_the_largest_bound():
    result = plan(config(), target())
    slow = dataclasses.replace(result, seconds={"compute": 1.0, "memory": 3.0})
    assert (slow.limit, slow.step_seconds, slow.fits) == ("memory", 3.0, True)
    assert not dataclasses.replace(result, memory_bytes=1).fits


@pytest.mark.slow
def test_search_shards_and_recomputes_nothing_when_memory_suffices():
    best, result = search(config(), target(hbm_bytes=2**40))
    assert result.mesh == sizes(data=8) and best.cfg.model.remat == "none" and result.fits
    assert best.num_sequences == max(SEQUENCES_PER_DEVICE)
    assert best.cfg.data.batch_size == 8 * best.num_sequences


def test_candidates_are_sorted_by_speed_and_fit_by_formula():
    by_speed = candidates(config(), target(hbm_bytes=100 * MIB))
    rates = [candidate.tokens_per_second for candidate in by_speed]
    assert rates == sorted(rates, reverse=True) and len(rates) > 10
    assert all(candidate.estimate.peak_bytes <= 100 * MIB for candidate in by_speed)
    assert {c.cfg.model.remat for c in by_speed} == {"dots", "full", "none"}
    assert {c.estimate.mesh["tensor"] for c in by_speed} > {1, 2}


@pytest.mark.slow
def test_candidates_change_only_mesh_remat_policy_and_batch_size():
    cfg = config(MeshConfig(slstm_seq="refuse"))
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accumulation=2))
    for candidate in candidates(cfg, target(hbm_bytes=100 * MIB)):
        assert candidate.cfg.mesh.slstm_seq == "refuse" and candidate.cfg.train == cfg.train
        mesh, num_sequences = candidate.estimate.mesh, candidate.num_sequences
        batch_size = 2 * mesh["data"] * mesh["fsdp"] * num_sequences
        assert candidate.cfg.data.batch_size == batch_size
        assert num_sequences == 1 or mesh["seq"] == 1


@pytest.fixture
def compiler(monkeypatch):
    """Fakes `plan`: adds `extra_bytes` to each estimate and records the compiled configs."""

    class Compiler:
        extra_bytes = 0
        compiled: list = []

        def __call__(self, cfg, target):
            result = estimated_plan(cfg, target)
            self.compiled.append(cfg)
            return dataclasses.replace(result, peak_bytes=result.peak_bytes + self.extra_bytes)

    fake = Compiler()
    fake.compiled = []
    monkeypatch.setattr(sys.modules["xlstm_jax.plan.search"], "plan", fake)
    return fake


@pytest.mark.slow
def test_candidates_that_cannot_fit_are_not_compiled(compiler):
    compiler.extra_bytes, hardware, plans = 60 * MIB, target(hbm_bytes=200 * MIB), []
    best, result = search(config(), hardware, on_plan=lambda _, plan: plans.append(plan))
    assert result.fits and not any(plan.fits for plan in plans[:-1])
    assert len(plans) == len(compiler.compiled) >= 2
    order = [candidate.cfg for candidate in candidates(config(), hardware)]
    assert order.index(best.cfg) > len(plans)  # most candidates that do not fit were not compiled


@pytest.mark.slow
def test_search_error_gives_the_smallest_peak_when_nothing_fits(compiler, monkeypatch):
    compiler.extra_bytes = 3 * 2**30
    monkeypatch.setattr(sys.modules["xlstm_jax.plan.search"], "MAX_COMPILED", 2)
    with pytest.raises(ConfigError, match=r"none of 2 compiled .* smallest needs 3\.\d GiB"):
        search(config(), target())
    with pytest.raises(ConfigError, match="none of 0 compiled configurations fits"):
        search(config(), target(hbm_bytes=MIB))


def test_slices_must_be_positive_and_1_for_gpus():
    with pytest.raises(ConfigError, match="slices must be 1 for GPUs, got 2"):
        find_target("h100:2x8", slices=2)
    with pytest.raises(ConfigError, match="slices must be at least 1, got 0"):
        find_target("v5e:4x4", slices=0)
