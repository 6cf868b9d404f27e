"""Run directories without training."""

import json
import pathlib

import pytest

from tests.report.records import ABOUT, eval_record, gate_record, train_record
from xlstm_jax.config import to_dict
from xlstm_jax.data import DataConfig
from xlstm_jax.modules import LMConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig


@pytest.fixture
def make_run(tmp_path):
    """Makes a run: `make_run("a", records, lr=1)`; keywords are fields of TrainConfig."""

    def make(name: str, records=None, about=ABOUT, **train) -> pathlib.Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        cfg = ExperimentConfig(
            name="tiny",
            model=LMConfig(vocab_size=257, dim=8, pattern="ms"),
            data=DataConfig(source="grammar"),
            train=TrainConfig(**dict(steps=100) | train),
        )
        if records is None:
            records = [train_record(step) for step in range(10, 101, 10)]
            records += [eval_record(step, 2 - step / 100) for step in (50, 100)]
            records += [gate_record(step) for step in (50, 100)]
        (folder / "config.json").write_text(json.dumps(to_dict(cfg)))
        (folder / "run.json").write_text(json.dumps(about))
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / "metrics.jsonl").write_text("".join(lines))
        return folder

    return make
