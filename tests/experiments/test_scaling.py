"""The sweeps of scaling laws: the micro-sweep, and the runs of the published study."""

import collections
import functools
import json

import pytest

from experiments import scaling_micro, scaling_paper
from tests.scaling import reference
from xlstm_jax import flops, scaling
from xlstm_jax.errors import ConfigError
from xlstm_jax.scaling import Point, Shape


def published() -> list[dict[str, str]]:
    """The runs of the study's analysis; skips the test unless XLSTM_REFERENCE_DATA has them."""
    return [run for run in reference.read("runs.csv") if run["selected"] == "True"]


def _shape(run) -> Shape:
    return Shape(int(run["embedding_dim"]), int(run["num_blocks"]), int(run["num_heads"]))


def _point(run) -> Point:
    budget = float(run["isoflop"]) if run["experiment"] == "isoflop" else None
    label = run["preset_tokens_per_param"]
    ratio = float(label if label not in ("", "extra") else run["tokens_per_param"])
    length = int(run["context_length"])
    return Point(run["model"], _shape(run), length, budget, None if budget else ratio)


def test_parameters_and_flops_equal_those_of_the_published_runs():
    runs = published()
    assert len(runs) == 640
    for run in runs:
        cfg = scaling_paper.FAMILIES[run["model"]](_shape(run))
        assert flops.count_params(cfg) == int(run["num_params"])
        sequences = int(run["global_batch_size"]) * int(run["train_steps"])
        length = int(run["context_length"])
        total = sequences * flops.train_flops(cfg, length)
        assert total == pytest.approx(float(run["train_flops"]), rel=1e-6)
        for column, options in (
            ("train_flops_full_attention", dict(attention="full")),
            ("train_flops_tfla", dict(count="tfla")),
        ):
            if run[column]:
                total = sequences * flops.train_flops(cfg, length, **options)
                assert total == pytest.approx(float(run[column]), rel=1e-6)


@pytest.mark.slow
def test_published_isoflop_runs_are_among_those_of_the_plan():
    sweep = scaling_paper.sweep()
    points = set(sweep.points())
    runs = [run for run in published() if run["experiment"] == "isoflop"]
    assert len(runs) == 574
    steps = {}
    for spec in _plan():
        model, data = spec.cfg.model, spec.cfg.data
        heads = scaling_paper.num_heads(spec.model, model.dim)
        shape = Shape(model.dim, model.num_blocks, heads)
        key = Point(spec.model, shape, data.seq_len, spec.isoflop, None)
        steps[key] = spec.cfg.train.steps
    rates = collections.Counter()
    for run in runs:
        point = _point(run)
        assert point in points
        assert sweep.batch_rule(point) == int(run["global_batch_size"])
        assert steps[point] == pytest.approx(int(run["train_steps"]), rel=0.1)
        rates[float(run["learning_rate"]) == sweep.lr_rule(point)] += 1
    assert rates[False] == 7  # exceptions that no rule explains


def test_published_ladder_is_that_of_the_plan():
    sweep = scaling_paper.sweep("ladder")
    points = set(sweep.points())
    runs = [run for run in published() if run["experiment"] == "token_param"]
    labels = [run for run in runs if run["preset_tokens_per_param"] not in ("", "extra")]
    batches, rates = collections.Counter(), collections.Counter()
    for run in labels:
        point = _point(run)
        assert point in points
        batches[sweep.batch_rule(point) == int(run["global_batch_size"])] += 1
        rates[sweep.lr_rule(point) == float(run["learning_rate"])] += 1
    # The first three runs of 7B have smaller batches.
    assert (len(labels), batches[False], rates[False]) == (61, 3, 0)


@functools.cache
def _plan() -> list[scaling.RunSpec]:
    return scaling.plan(scaling_paper.sweep())


@pytest.mark.slow
def test_plan_of_the_study_keeps_tokens_per_batch_and_budgets():
    specs = _plan()
    assert {spec.cfg.data.batch_size * spec.cfg.data.seq_len for spec in specs} == {2**20, 2**21}
    assert len(specs) == 700
    assert all(abs(spec.train_flops / spec.isoflop - 1) < 0.06 for spec in specs if spec.isoflop)
    assert {spec.model for spec in specs if spec.isoflop == 6e20} == {"mlstm"}
    parts = specs[0].cfg.train.parts
    assert (parts.warmup, parts.cooldown) == (750, 1000)


def test_every_run_of_the_micro_sweep_is_near_its_budget():
    specs = scaling.plan(scaling_micro.sweep())
    assert len(specs) == 42
    assert all(abs(spec.train_flops / spec.isoflop - 1) < 0.05 for spec in specs if spec.isoflop)
    assert sum(spec.train_flops for spec in specs) < 4.2e13
    cells = collections.Counter((spec.model, spec.isoflop) for spec in specs)
    assert len(cells) == 12 and min(cells.values()) >= 3


def test_unknown_size_is_refused():
    for module in (scaling_micro, scaling_paper):
        with pytest.raises(ConfigError, match="size='tiny' is unknown"):
            module.sweep("tiny")


def _family(losses, exponent=0.5):
    budgets = [dict(lowest_loss=loss, convex=True) for loss in losses]
    return {"budgets": budgets, "exponent": exponent}


def test_outcome_of_the_micro_sweep_can_fail():
    runs = [dict(train_flops=1.01e11, isoflop=1e11)]
    good = {"a": _family([3.0, 2.5, 2.2])}
    assert list(scaling_micro.outcome(runs, good).values()) == [True] * 4
    bad = {"a": _family([3.0, 2.5, 2.6], exponent=0.95)}
    for fit in bad["a"]["budgets"][:2]:
        fit["convex"] = False
    far = [dict(train_flops=1.2e11, isoflop=1e11)]
    assert list(scaling_micro.outcome(far, bad).values()) == [False] * 4


@pytest.mark.slow
def test_smallest_micro_sweep_writes_a_table_and_resumes(tmp_path, one_device, monkeypatch):
    monkeypatch.setattr(scaling_micro, "FAMILIES", {"llama": scaling_micro.llama})
    options = dict(size="smoke", runs=tmp_path / "runs", out=tmp_path / "result.json")
    assert scaling_micro.main(scaling_micro.Options(**options)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["rows"]) == 6 and result["outcome"]
    assert (tmp_path / "result.png").exists() and (tmp_path / "runs" / "table.csv").exists()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/result.json")}
    assert scaling_micro.main(scaling_micro.Options(**options)) == 0
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/result.json")}
