"""Exports and profiles of runs, and where the time of a run goes."""

import json

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.train import TrainConfig, fit
from xlstm_jax.train.clock import PARTS
from xlstm_jax.train.rates import Rates


def export(folder, params):
    folder.mkdir()
    (folder / "weights").write_text(str(len(params)))


def test_every_second_checkpoint_and_the_last_are_exported(tiny_lm, experiment, tmp_path):
    cfg = experiment(steps=3, eval_every=0, checkpoint_every=1, export_every=2)
    run_dir = tmp_path / "run"
    fit(cfg, run_dir, exporter=export)
    assert sorted(path.name for path in (run_dir / "export").iterdir()) == ["2", "3"]
    assert (run_dir / "export" / "2" / "weights").exists()
    fit(cfg, run_dir, exporter=export)  # finished: the folders exist


def test_an_export_that_fails_is_logged_and_the_run_continues(
    tiny_lm, experiment, tmp_path, caplog
):
    def fail(folder, params):
        folder.mkdir()
        raise OSError("disk")

    cfg = experiment(steps=2, eval_every=0, checkpoint_every=1, export_every=1)
    assert fit(cfg, tmp_path / "run", exporter=fail).finished
    assert [m.split(" (")[0] for m in caplog.messages] == [
        "the export export/1 failed",
        "the export export/2 failed",
    ]
    assert not list((tmp_path / "run" / "export").iterdir())


def test_exports_without_an_exporter_are_refused(tiny_lm, experiment, tmp_path):
    with pytest.raises(ConfigError, match="train.export_every=1 needs the argument exporter"):
        fit(experiment(export_every=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_profile_of_some_steps_is_written(tiny_lm, experiment, tmp_path):
    cfg = experiment(steps=4, eval_every=0, profile="1:3")
    fit(cfg, tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("value", ["10", "10:", "a:b", "10:10", "15:10", "-1:3", "1:1001", "1:2:3"])
def test_a_malformed_profile_is_a_config_error(value):
    with pytest.raises(ConfigError, match="train.profile must be two increasing numbers"):
        TrainConfig(profile=value)
    assert TrainConfig(profile="10:15").profile_steps == range(10, 15)
    assert TrainConfig().profile_steps is None


def test_a_run_reports_rates_goodput_and_the_seconds_of_its_parts(tiny_lm, experiment, tmp_path):
    cfg, run_dir = experiment(steps=6), tmp_path / "run"
    fit(cfg, run_dir, flops_per_step=100.0)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    record = next(r for r in lines if "step_time" in r)
    assert record["tokens_per_second_per_device"] == record["tokens_per_second"]
    flops = record["model_flops_per_second_per_device"]
    assert flops == pytest.approx(100 / record["step_time"])
    assert "mfu" not in record  # the peak of a CPU is not known
    assert 0 < record["goodput"] < 1
    seconds = json.loads((run_dir / "run.json").read_text())["seconds"]
    assert set(seconds) == {*PARTS, "total"} and all(x > 0 for x in seconds.values())
    assert sum(seconds[part] for part in PARTS) < seconds["total"]


def test_rates_are_per_device_and_utilization_is_relative_to_the_peak():
    rates = Rates(num_devices=4, peak_flops=50.0, flops_per_step=400.0)
    assert rates.at(2.0, tokens=80.0, share_of_batch=0.5) == {
        "tokens_per_second": 40.0,
        "tokens_per_second_per_device": 10.0,
        "model_flops_per_second": 100.0,
        "model_flops_per_second_per_device": 25.0,
        "mfu": 0.5,
    }
    assert "mfu" not in Rates(4, None, 400.0).at(2.0, 80.0, 0.5)
    assert set(Rates(4, 50.0, None).at(2.0, 80.0, 0.5)) == {
        "tokens_per_second",
        "tokens_per_second_per_device",
    }
