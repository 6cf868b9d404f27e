"""The parity experiment: samples, criteria of the outcome, and a run at the smallest size."""

import json

import numpy as np
import pytest

from experiments import parity
from xlstm_jax.config import ConfigError


def model_record(*best, seeds=3):
    """Record of a model whose first seed has the given scores and the others are at chance."""
    buckets = [f"{low}-{high}" for low, high in parity.BUCKETS]
    scores = {b: [s] + [0.0] * (seeds - 1) for b, s in zip(buckets, best, strict=True)}
    return {"scaled_accuracy": scores}


def test_one_seed_must_solve_every_length():
    models = {
        "xLSTM[0:1]": model_record(1.0, 1.0, 0.99, 0.96),
        "xLSTM[1:1]": model_record(1.0, 1.0, 0.99, 0.94),
        "xLSTM[1:0]": model_record(1.0, 0.9, 0.5, 0.1),
        "Llama": model_record(1.0, 0.9, 0.5, 0.31),
    }
    assert list(parity.outcome(models).values()) == [True, False, True, False]


def test_different_seeds_for_different_lengths_do_not_count():
    mixed = model_record(1.0, 1.0, 1.0, 0.0)
    mixed["scaled_accuracy"]["128-256"] = [0.0, 1.0, 0.0]
    models = {"xLSTM[0:1]": mixed, "xLSTM[1:1]": mixed}
    models |= {"xLSTM[1:0]": model_record(0, 0, 0, 0.31), "Llama": model_record(0, 0, 0, 0.1)}
    assert list(parity.outcome(models).values()) == [False, False, False, True]


def test_samples_of_the_test_split_have_lengths_within_their_bucket():
    for low, high in parity.BUCKETS:
        batch = parity.samples(parity.CPU.data, "test", 0, 200, low, high)
        lengths = 1 + (batch.segment_ids > 0).sum(axis=1)  # the answer is not an input
        assert lengths.min() >= low and lengths.max() <= high
        assert (batch.weights.sum(axis=1) == 1).all()


def test_an_unknown_size_is_rejected_with_the_known_ones():
    with pytest.raises(ConfigError, match="'huge' is unknown; use one of: smoke, cpu, paper"):
        parity.config("huge")


@pytest.mark.slow
def test_the_smallest_size_writes_a_result_and_a_plot(tmp_path, monkeypatch):
    # Less to compile: one block each, and two buckets.
    monkeypatch.setattr(parity, "BUCKETS", (parity.BUCKETS[0], parity.BUCKETS[-1]))
    patterns = {"xLSTM[0:1]": "s", "xLSTM[1:1]": "s", "xLSTM[1:0]": "m", "Llama": "a"}
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
