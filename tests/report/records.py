"""Records and descriptions of runs in the documented format, without training."""

import json
import math
import pathlib

from xlstm_jax.config import to_dict
from xlstm_jax.data import DataConfig
from xlstm_jax.modules import LMConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig

ABOUT = {
    "name": "tiny",
    "started": "2026-01-01T00:00:00+00:00",
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "platform": "Linux",
    "devices": ["cpu:0"],
    "git": {"commit": "abc", "changed": False},
    "num_params": 1234,
    "data": {"train": {"source": "grammar", "num_tokens": 4000}},
}


def train_record(step: int, **fields) -> dict:
    """The record of ten steps that end at `step`."""
    record = dict(step=step, loss=1 + math.exp(-step / 50), lr=1e-3, grad_norm=0.5, skipped=0)
    record |= dict(skipped_in_a_row=0, tokens=640, tokens_seen=64 * step, step_time=0.5)
    return record | dict(data_wait=0.1, tokens_per_second=128.0, z_loss=0.0) | fields


def eval_record(step: int, loss: float) -> dict:
    """The record of an evaluation, with one of `data.eval_sets`."""
    fields = dict(valid_loss=loss, valid_bits_per_byte=2 * loss, valid_accuracy=0.5)
    return {"step": step} | fields | {"code_loss": loss + 1}


def gate_record(step: int, blocks=("0:m", "1:s"), heads: int = 2) -> dict:
    """The statistics of gates; a head remembers ten times longer than the one before."""
    values = dict(effective_length=[10.0 ** (head + 1) for head in range(heads)])
    values |= dict(forget_mean=[1 - 0.1 ** (head + 1) for head in range(heads)])
    return {"step": step, "gates": {block: values for block in blocks}}


def write_run(folder: pathlib.Path, records=None, about=ABOUT, **train) -> pathlib.Path:
    """Writes a run of 100 steps, or of these records; keywords are fields of TrainConfig."""
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
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder
