"""A run of the first version, with its old field names, can be resumed and evaluated.

`tests/golden/run_0.tar.gz` was written by the commit a3b3597 with the `made_by.py` inside: config,
the records of all six steps, and the checkpoint of step 3, in the middle of a logging interval.
"""

import json
import tarfile
from pathlib import Path

import pytest

from xlstm_jax import cpu
from xlstm_jax.cli import main
from xlstm_jax.config import load_config
from xlstm_jax.train import CheckpointError, ExperimentConfig, checkpoint, fit, rundir

ARCHIVE = Path(__file__).parents[1] / "golden" / "run_0.tar.gz"


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_old_field_names_are_upgraded(old):
    values = json.loads((old / "config.json").read_text())
    assert values["mesh"]["smallest_cut"] == 4 and values["mesh"]["slstm_time"] == "gather"
    assert values["model"]["slstm"]["implementation"] == "scan"
    cfg = load_config(old, ExperimentConfig)
    assert (cfg.mesh.min_shard_size, cfg.mesh.slstm_seq) == (4, "gather")
    assert cfg.model.slstm.implementation == "recurrent"
    rundir.check(old, cfg)


@pytest.mark.slow
def test_an_old_run_is_evaluated_and_resumed_with_the_same_records(old, capsys, monkeypatch):
    monkeypatch.setattr(cpu, "prepare", lambda: None)
    expected = rundir.read_metrics(old / rundir.METRICS)
    assert main(["evaluate", str(old), "--step", "3"]) == 0
    assert "1.2620" in capsys.readouterr().out  # the value that the first version printed
    result = fit(load_config(old, ExperimentConfig), old)
    assert result.finished and result.step == 6
    records = rundir.read_metrics(old / rundir.METRICS)
    assert [r["step"] for r in records] == [2, 4, 6, 6]
    for record, other in zip(records, expected, strict=True):
        for name in {"loss", "tokens_seen", "grad_norm", "param_norm", "lr", "valid_loss"} & {
            *other
        }:
            assert record[name] == pytest.approx(other[name], rel=1e-5), name
    step = old / checkpoint.FOLDER / "6"
    assert (step / "manifest.json").is_file() and "ema_grad_norm" in (
        step / "state" / "_METADATA"
    ).read_text()
    assert fit(load_config(old, ExperimentConfig), old).step == 6  # in the new layout


def test_checksums_of_an_old_run_are_verified(old):
    victim = max((old / "checkpoints").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointError, match="its checksum differs"):
        fit(load_config(old, ExperimentConfig), old)
