"""Runs of a sweep that are trained together: each ends as it would alone, also interrupted."""

import dataclasses
import json
import shutil
from typing import Any

import numpy as np
import pytest

from tests.scaling.sweeps import sweep
from xlstm_jax.errors import ArgumentError, UnsupportedError
from xlstm_jax.scaling import Grids, Shape, collect, grids, plan, run, runs
from xlstm_jax.train import LoraConfig, lock
from xlstm_jax.train.grid import train_members

RATES = (3e-3, 1e-3)
SWEEP: dict[str, Any] = dict(
    shapes=[Shape(16, 1, 2)],
    budgets=[6e8],
    batch_rule=lambda point: 8,  # separate runs divide it among the devices of the tests
    lr_rule=lambda point: RATES,
    seeds=(0, 1),
    train=dataclasses.replace(sweep().train, checkpoint_every=10),
)
FAMILIES = {"llama": sweep().families["llama"]}
SPECS = plan(sweep(**SWEEP, families=FAMILIES))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder with the finished grid of `SPECS`."""
    folder = tmp_path_factory.mktemp("together")
    assert [one.reason for one in run(SPECS, folder, launcher=Grids())] == [""] * 4
    return folder


def results(folder):
    return {record["run_id"]: record for record in collect(folder).records}


def test_plan_has_a_run_per_learning_rate_and_seed():
    settings = [(spec.cfg.train.lr, spec.cfg.train.seed) for spec in SPECS]
    assert settings == [(lr, seed) for lr in RATES for seed in (0, 1)]
    names = [spec.cfg.name for spec in SPECS]
    assert len(set(names)) == 4 and "_lr0.003_s0" in names[0]
    assert len({spec.run_id for spec in SPECS}) == 4


def test_learning_rates_may_be_any_sequence_but_an_empty_one():
    rates = np.array(RATES)
    specs = plan(sweep(**SWEEP | {"lr_rule": lambda point: rates}, families=FAMILIES))
    assert [spec.run_id for spec in specs] == [spec.run_id for spec in SPECS]
    with pytest.raises(ArgumentError, match="lr_rule must return a learning rate, or several, got"):
        plan(sweep(**SWEEP | {"lr_rule": lambda point: ()}, families=FAMILIES))
    with pytest.raises(ArgumentError, match="equal configs"):
        plan(sweep(**SWEEP | {"lr_rule": lambda point: (1e-3, 1e-3)}, families=FAMILIES))


@pytest.mark.slow
def test_losses_are_those_of_separate_runs(tmp_path, together):
    assert [one.reason for one in run(SPECS, tmp_path)] == [""] * 4
    alone = results(tmp_path)
    for name, result in results(together).items():
        for loss in ("val_loss", "train_loss"):
            assert result[loss] == pytest.approx(alone[name][loss], rel=1e-4), name
    losses = [result["val_loss"] for result in alone.values()]
    assert np.ptp(losses) > 0.01  # much more than the tolerance


@pytest.mark.slow
def test_every_run_has_its_record_and_metrics(together):
    assert sorted(results(together)) == sorted(spec.run_id for spec in SPECS)
    assert not list((together / grids.FOLDER).glob("*"))
    for spec in SPECS:
        lines = (together / spec.run_id / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == spec.cfg.train.steps
        result = results(together)[spec.run_id]
        assert result["train_loss"] == json.loads(lines[-1])["loss"]
        assert result["train_seconds"] > 0 and result["learning_rate"] == spec.cfg.train.lr


@pytest.mark.slow
def test_interrupted_grid_continues_bit_for_bit(tmp_path, together, monkeypatch, unchecked_types):
    steps = []

    def interrupted(model, cfg, batches, members, *, run_dir):
        def counted(first, count):
            steps.append(first)
            if first >= 20 and len(steps) < 5:
                raise KeyboardInterrupt
            return batches(first, count)

        return train_members(model, cfg, counted, members, run_dir=run_dir)

    monkeypatch.setattr(grids, "train_members", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(SPECS, tmp_path, launcher=Grids())
    assert {one.state for one in run(SPECS, tmp_path, launcher=Grids())} == {"finished"}
    assert steps[:6] == [0, 0, 10, 20, 0, 20]  # the first batch of each call gives shapes
    for name, result in results(tmp_path).items():
        for loss in ("val_loss", "train_loss"):
            assert result[loss] == results(together)[name][loss]


@pytest.mark.slow
def test_finished_runs_are_not_repeated(tmp_path, together, monkeypatch, unchecked_types):
    out = tmp_path / "out"
    shutil.copytree(together, out)
    (out / SPECS[0].run_id / "result.json").unlink()
    calls = []
    monkeypatch.setattr(Grids, "train", lambda self, folders, train: calls.append(folders))
    run(SPECS, out, launcher=Grids())
    assert calls == [[out / SPECS[0].run_id]]


def test_run_of_another_process_is_left_alone(tmp_path, monkeypatch, unchecked_types):
    trained = []
    monkeypatch.setattr(grids, "_train", lambda folders, *rest: trained.extend(folders))
    (tmp_path / SPECS[0].run_id).mkdir()
    with lock.hold(tmp_path / SPECS[0].run_id):
        run(SPECS, tmp_path, launcher=Grids())
    assert trained == [tmp_path / spec.run_id for spec in SPECS[1:]]


def test_runs_of_other_shapes_or_data_are_other_grids(tmp_path, monkeypatch, unchecked_types):
    groups = []
    monkeypatch.setattr(Grids, "train", lambda self, folders, train: groups.append(len(folders)))
    specs = plan(sweep(**SWEEP | {"shapes": [Shape(16, 1, 2), Shape(24, 1, 2)]}))
    run(specs, tmp_path / "shapes", launcher=Grids())
    assert groups == [4] * 4
    groups.clear()
    run(SPECS, tmp_path / "split", launcher=Grids(max_members=3))
    assert groups == [3, 1]
    groups.clear()
    averaged = dataclasses.replace(SWEEP["train"], ema_decay=0.9)
    run(plan(sweep(**SWEEP | {"train": averaged}, families=FAMILIES)), tmp_path / "ema",
        launcher=Grids())  # fmt: skip
    assert groups == [1] * 4


@pytest.mark.parametrize(
    "changes",
    [
        dict(lora=LoraConfig(rank=2)),
        dict(init_from="run"),
        dict(ema_decay=0.9),
        dict(carry_state=True),
        dict(batch_ramp=((0, 0.5), (5, 1.0))),
        dict(optimizer="schedule_free_adamw", cooldown_steps=0),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_runs_with_parts_that_grids_lack_are_alone(changes, tmp_path):
    data = dataclasses.replace(SPECS[0].cfg.data, packing="stream")  # carry_state needs it
    plain = dataclasses.replace(SPECS[0].cfg, data=data)
    own = {name: value for name, value in changes.items() if name in ("lora", "init_from")}
    of_train = {name: value for name, value in changes.items() if name not in own}
    other = dataclasses.replace(plain, train=dataclasses.replace(plain.train, **of_train), **own)
    for name, cfg, is_alone in (("plain", plain, False), ("other", other, True)):
        runs.prepare(tmp_path / name, SPECS[0]._replace(cfg=cfg))
        assert (grids._group_of(tmp_path / name) == name) == is_alone


def test_failures_are_recorded_in_every_run(tmp_path, monkeypatch, unchecked_types):
    def fail(*args):
        raise OSError("disk")

    monkeypatch.setattr(grids, "_train", fail)
    result = run(SPECS, tmp_path, launcher=Grids())
    assert [(one.state, one.code) for one in result] == [("failed", 4)] * 4


def test_member_that_diverged_fails_alone(tmp_path):
    specs = plan(sweep(**SWEEP | {"lr_rule": lambda point: (3e-3, 1e30)}, families=FAMILIES))
    result = run(specs, tmp_path, launcher=Grids())
    assert [one.code for one in result] == [0, 0, 3, 3]
    assert "not finite" in result[2].reason
    assert len(collect(tmp_path).records) == 2


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(grids.jax, "process_count", lambda: 2)
    with pytest.raises(UnsupportedError, match="needs one process, got 2; use the launcher Local"):
        Grids().launch([], runs.execute)
