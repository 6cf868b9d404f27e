"""The search for the fastest run that fits: candidates are plans by formula."""

import dataclasses
import sys

import pytest

from tests.plan.runs import config, sizes, target
from xlstm_jax.config import ConfigError
from xlstm_jax.plan import find_target, plan, search
from xlstm_jax.plan.report import estimated_plan
from xlstm_jax.plan.search import SEQUENCES, candidates
from xlstm_jax.sharding import MeshConfig

MIB = 2**20


def test_a_plan_without_a_compiler_says_so_and_is_a_lower_bound():
    result = plan(config(MeshConfig(fsdp=4)), target())
    assert result.refusal == "for the test" and result.compile_seconds == 0
    assert set(result.seconds) == {"compute", "network"}
    # Parameters, two moments and gradients.
    assert result.peak_bytes > 4 * result.params_bytes
    assert result.mesh == sizes(data=2, fsdp=4)
    with pytest.raises(ConfigError, match="data.batch_size must be a multiple of 8"):
        plan(config(MeshConfig(fsdp=4), batch_size=9), target())


def test_a_plan_knows_its_limit():
    result = plan(config(), target())
    slow = dataclasses.replace(result, seconds={"compute": 1.0, "memory": 3.0})
    assert (slow.limit, slow.step_seconds, slow.fits) == ("memory", 3.0, True)
    assert not dataclasses.replace(result, memory_bytes=1).fits


def test_with_room_for_everything_nothing_is_sharded_or_recomputed():
    best, result = search(config(), target(hbm_bytes=2**40))
    assert result.mesh == sizes(data=8) and best.cfg.model.remat == "none" and result.fits
    assert best.num_sequences == max(SEQUENCES)
    assert best.cfg.data.batch_size == 8 * best.num_sequences


def test_candidates_are_ordered_by_speed_and_may_fit():
    options = candidates(config(), target(hbm_bytes=100 * MIB))
    rates = [candidate.tokens_per_second for candidate in options]
    assert rates == sorted(rates, reverse=True) and len(rates) > 10
    assert all(candidate.estimate.peak_bytes <= 100 * MIB for candidate in options)
    assert {c.cfg.model.remat for c in options} == {"dots", "full", "none"}
    assert {c.estimate.mesh["tensor"] for c in options} > {1, 2}


def test_candidates_change_nothing_but_mesh_rematerialization_and_batch():
    cfg = config(MeshConfig(slstm_seq="refuse"))
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accumulation=2))
    for one in candidates(cfg, target(hbm_bytes=100 * MIB)):
        assert one.cfg.mesh.slstm_seq == "refuse" and one.cfg.train == cfg.train
        mesh = one.estimate.mesh
        assert one.cfg.data.batch_size == 2 * mesh["data"] * mesh["fsdp"] * one.num_sequences
        assert one.num_sequences == 1 or mesh["seq"] == 1


@pytest.fixture
def compiler(monkeypatch):
    """Has plans cost `compiler.extra` bytes more than their estimate; lists what was compiled."""

    class Compiler:
        extra = 0
        compiled: list = []

        def __call__(self, cfg, target):
            result = estimated_plan(cfg, target)
            self.compiled.append(cfg)
            return dataclasses.replace(result, peak_bytes=result.peak_bytes + self.extra)

    fake = Compiler()
    fake.compiled = []
    monkeypatch.setattr(sys.modules["xlstm_jax.plan.search"], "plan", fake)
    return fake


def test_candidates_that_cannot_fit_by_what_was_compiled_are_passed_over(compiler):
    compiler.extra, hardware, reported = 60 * MIB, target(hbm_bytes=200 * MIB), []
    best, result = search(config(), hardware, on_plan=lambda _, plan: reported.append(plan))
    assert result.fits and not any(plan.fits for plan in reported[:-1])
    assert len(reported) == len(compiler.compiled) >= 2
    order = [candidate.cfg for candidate in candidates(config(), hardware)]
    assert order.index(best.cfg) > len(reported)  # most of what cannot fit was not compiled


def test_a_run_that_fits_nowhere_is_refused_with_what_the_smallest_needs(compiler, monkeypatch):
    compiler.extra = 3 * 2**30
    monkeypatch.setattr(sys.modules["xlstm_jax.plan.search"], "MAX_COMPILED", 2)
    with pytest.raises(ConfigError, match=r"no room for this run.*smallest needs 3\.\d GiB"):
        search(config(), target())
    with pytest.raises(ConfigError, match="0 were compiled and none fits"):
        search(config(), target(hbm_bytes=MIB))


def test_slices_are_of_tpus():
    with pytest.raises(ConfigError, match="slices=2 must be 1, or more of a TPU"):
        find_target("h100:2x8", slices=2)
    with pytest.raises(ConfigError, match="slices=0"):
        find_target("v5e:4x4", slices=0)
