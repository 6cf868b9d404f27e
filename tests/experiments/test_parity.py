"""The parity experiment: what it asks, how it judges, and that its smallest size runs through."""

import json

import numpy as np
import pytest

from experiments import parity
from xlstm_jax.config import ConfigError


def row(*best, seeds=3):
    """A model's row whose first seed has these scores, the others chance."""
    buckets = [f"{low}-{high}" for low, high in parity.BUCKETS]
    scores = {b: [s] + [0.0] * (seeds - 1) for b, s in zip(buckets, best, strict=True)}
    return {"scaled_accuracy": scores}


def test_one_seed_that_solves_every_length_is_an_answer():
    models = {
        "xLSTM[0:1]": row(1.0, 1.0, 0.99, 0.96),
        "xLSTM[1:1]": row(1.0, 1.0, 0.99, 0.94),
        "xLSTM[1:0]": row(1.0, 0.9, 0.5, 0.1),
    }
    assert list(parity.outcome(models).values()) == [True, False, True]


def test_different_seeds_for_different_lengths_are_none():
    mixed = row(1.0, 1.0, 1.0, 0.0)
    mixed["scaled_accuracy"]["128-256"] = [0.0, 1.0, 0.0]
    models = {"xLSTM[0:1]": mixed, "xLSTM[1:1]": mixed, "xLSTM[1:0]": row(0, 0, 0, 0.31)}
    assert list(parity.outcome(models).values()) == [False, False, False]


def test_held_out_samples_have_the_lengths_of_their_bucket():
    for low, high in parity.BUCKETS:
        batch = parity.samples(parity.CPU.data, "test", 0, 200, low, high)
        lengths = 1 + (batch.segment_ids > 0).sum(axis=1)  # the answer itself is never fed in
        assert lengths.min() >= low and lengths.max() <= high
        assert (batch.weights.sum(axis=1) == 1).all()


def test_an_unknown_size_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="'huge' is not known here; use one of: smoke, cpu, pap"):
        parity.config("huge")


@pytest.mark.slow
def test_the_smallest_size_writes_its_result_and_its_picture(tmp_path, monkeypatch):
    patterns = {"xLSTM[0:1]": "s", "xLSTM[1:1]": "ms", "xLSTM[1:0]": "m"}  # half as much to compile
    monkeypatch.setattr(parity, "PATTERNS", patterns)
    out = tmp_path / "parity.json"
    assert parity.main(parity.Options(size="smoke", num_seeds=2, out=out)) == 0
    result = json.loads(out.read_text())
    for model in result["models"].values():
        scores = np.array(list(model["scaled_accuracy"].values()))
        assert scores.shape == (len(parity.BUCKETS), 2)
        assert np.isfinite(scores).all() and (np.abs(scores) <= 1).all()
        assert np.isfinite(model["final_loss"]).all()
    assert out.with_suffix(".png").stat().st_size < 300 * 1024
