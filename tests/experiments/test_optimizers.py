"""The experiment on optimizers: its configs and outcome, and a run at the smallest size."""

import dataclasses
import json

import pytest

from experiments import char_lm, optimizers
from xlstm_jax.train import fit


def record(name, *final):
    return {
        "optimizer": name,
        "final": dict(enumerate(final, start=1)),
        "mean": sum(final) / len(final),
    }


def test_muon_must_be_better_with_every_seed_and_the_others_close():
    records = [
        record("muon", 1.9, 2.1),
        record("adamw", 2.0, 2.0),
        record("lion", 2.05, 2.05),
        record("schedule_free_adamw", 2.0, 2.2),
    ]
    assert list(optimizers.outcome(records).values()) == [False, True, False]
    records[0] = record("muon", 1.9, 1.99)
    assert optimizers.outcome(records)["Muon below AdamW with every seed"]
    assert optimizers.outcome(records[:1]) == {}  # nothing to compare with


def test_runs_differ_from_char_lm_only_in_training_and_the_order_of_data():
    cfg = optimizers.config("cpu", "lion", 1e-4, seed=2)
    assert cfg.model == char_lm.CPU.model and cfg.data.source == char_lm.CPU.data.source
    assert (cfg.train.optimizer, cfg.train.lr, cfg.train.seed) == ("lion", 1e-4, 2)
    assert cfg.train.steps == char_lm.CPU.train.steps
    names = [c.name for o in optimizers.RATES for c in optimizers.searches("cpu", o).values()]
    assert len({*names, cfg.name}) == len(names) + 1


@pytest.mark.slow
def test_the_smallest_size_writes_a_result_and_does_not_repeat_finished_runs(
    tmp_path, monkeypatch, capsys, one_device
):
    small = dataclasses.replace(char_lm.SMOKE.model, pattern="m")  # less to compile
    monkeypatch.setitem(char_lm.SIZES, "smoke", dataclasses.replace(char_lm.SMOKE, model=small))
    options = dict(size="smoke", seeds=(1,), runs=tmp_path / "runs", out=tmp_path / "o.json")
    assert optimizers.main(optimizers.Options(optimizers=("muon",), **options)) == 0
    trained = []

    def counted(cfg, run_dir):
        trained.append(cfg.name)
        return fit(cfg, run_dir)

    monkeypatch.setattr(optimizers, "fit", counted)
    assert optimizers.main(optimizers.Options(optimizers=("muon", "adamw"), **options)) == 0
    rate = {name: f"{optimizers.RATES[name][1]:g}" for name in ("muon", "adamw")}
    assert trained == [
        f"smoke_search_adamw_{rate['adamw']}_0",
        f"smoke_run_adamw_{rate['adamw']}_1",
    ]
    result = json.loads((tmp_path / "o.json").read_text())
    assert [one["optimizer"] for one in result["records"]] == ["muon", "adamw"]
    for one in result["records"]:
        assert 0 < one["mean"] < 9 and list(one["curves"]["1"]) == [str(s) for s in range(2, 21, 2)]
    assert f"| Muon | {rate['muon']} |" in capsys.readouterr().out
    assert 0 < (tmp_path / "o.png").stat().st_size < 300 * 1024
