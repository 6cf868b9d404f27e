"""Where a run gets its batches: ramps, mixtures, validation sets, and the caller's own data."""

import json
import types

import grain
import jax
import numpy as np
import pytest

from xlstm_jax import data
from xlstm_jax.config import ConfigError
from xlstm_jax.data import Batch, batch_at, load
from xlstm_jax.data.batch_sizes import BatchSizes
from xlstm_jax.train import fit, metrics
from xlstm_jax.train.loop import Loop


@pytest.fixture(autouse=True)
def quick_model(tiny_lm):
    """All runs train the tiny model."""


def records(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_with_a_ramp_is_resumed_exactly(experiment, tmp_path, assert_same):
    cfg = experiment(batch_ramp=((0, 0.25), (4, 0.5), (9, 1.0)), checkpoint_every=4, keep=9)
    full = fit(cfg, tmp_path / "full")
    seen = [record["tokens_seen"] for record in records(tmp_path / "full") if "loss" in record]
    assert seen[0] < seen[1] - seen[0] < seen[3] - seen[2]
    for step in ("8", "12"):
        (tmp_path / "full" / "checkpoints" / step).rename(tmp_path / step)
    again = fit(cfg, tmp_path / "full")
    assert_same(again.state, full.state)


def test_the_mean_batch_of_an_interval_is_that_of_its_own_steps():
    """Rates of FLOPs use it; the sizes of the steps are 2, 2, 2, 4, 8, 8, ..."""
    sizes = BatchSizes(8, ((0, 0.25), (3, 0.5), (4, 1.0)))
    loop = types.SimpleNamespace(_cfg=types.SimpleNamespace(batch_sizes=sizes))
    for step, count, expected in ((2, 2, 2), (4, 2, 3), (5, 3, 14 / 3), (9, 2, 8)):
        totals = metrics.empty()._replace(steps=np.float32(count))
        assert Loop._mean_batch(loop, step, totals) == pytest.approx(expected / 8)


@pytest.mark.parametrize(
    "train,message",
    [
        ({"batch_ramp": ((0, 0.3),)}, "integer numbers"),
        ({"batch_ramp": ((0, 0.25), (5, 1.0)), "accumulation": 2}, "accumulation, got 1 and 2"),
    ],
)
def test_ramps_that_do_not_divide_are_rejected(experiment, train, message):
    with pytest.raises(ConfigError, match=message):
        experiment(**train)


@pytest.mark.slow
def test_every_validation_set_is_evaluated_to_its_last_token(experiment, text, tmp_path):
    sets = {"names": str(text / "valid"), "own": str(text / "test")}
    cfg = experiment(data={"eval_sets": sets}, steps=4, eval_batches=None)
    result = fit(cfg, tmp_path)
    for name in ("valid", "names", "own"):
        assert result.evaluation[f"{name}_bits_per_byte"] > 0
    about = json.loads((tmp_path / "run.json").read_text())["data"]
    assert set(about) == {"train", "valid", "names", "own"}
    documents = sum(about["own"]["num_documents"].values())
    assert result.evaluation["own_tokens"] == about["own"]["num_tokens"] - documents


def test_a_mixture_trains_and_records_the_sequences_of_its_sources(experiment, tmp_path):
    data = {"sources": {"a": "topics", "b": "grammar"}, "weights": {"a": 3, "b": 1}}
    cfg = experiment(data=data)
    fit(cfg, tmp_path)
    last = [record for record in records(tmp_path) if "loss" in record][-1]
    assert last["sequences_a"] + last["sequences_b"] == 12 * 4
    assert "valid_bits_per_byte" in records(tmp_path)[-1]
    other = experiment(data=data | {"weights": {"a": 1, "b": 1}})
    with pytest.raises(ConfigError, match="belongs to another config .data.weights"):
        fit(other, tmp_path)


def test_own_data_equal_to_those_of_the_config_give_the_same_run(experiment, tmp_path, assert_same):
    cfg = experiment()
    examples, expected = load(cfg.data, "train"), fit(cfg, tmp_path / "config").state
    dataset = data.dataset(examples, cfg.data)
    assert_same(fit(cfg, tmp_path / "map", data=dataset).state, expected)
    on_devices = [jax.tree.map(jax.numpy.asarray, dataset[step]) for step in range(12)]
    assert_same(fit(cfg, tmp_path / "list", data=on_devices).state, expected)
    # Resumed in the middle.
    for kind, given in (("map", dataset), ("list", on_devices)):
        for step in ("10", "12"):
            (tmp_path / kind / "checkpoints" / step).rename(tmp_path / f"{kind}{step}")
        assert_same(fit(cfg, tmp_path / kind, data=given).state, expected)


def with_changes(batch, **changes):
    return [batch._replace(**changes)] * 12


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda batch: 7, "data must be a grain.MapDataset or an iterable of"),
        (lambda batch: [batch] * 3, "a batch for each of train.steps=12, but it ends after 3"),
        (lambda batch: grain.MapDataset.range(3), "for each of train.steps=12, got 3"),
        (lambda batch: [tuple(batch)] * 12, "of the type xlstm_jax.data.Batch, got .* at step 0"),
        (lambda batch: with_changes(batch, inputs=batch.inputs[:2]), r"inputs .* shape \(4, 16\)"),
        (lambda batch: with_changes(batch, targets=batch.weights), "targets .* must be int32"),
        (lambda batch: with_changes(batch, inputs=batch.inputs + 257), "must be below 257"),
    ],
)
def test_own_data_that_do_not_fit_are_rejected_in_one_line(experiment, tmp_path, make, message):
    cfg = experiment()
    batch = Batch(*map(np.copy, batch_at(load(cfg.data, "train"), cfg.data, 0)))
    with pytest.raises(ConfigError, match=message) as error:
        fit(cfg, tmp_path, data=make(batch))
    assert "\n" not in str(error.value)
