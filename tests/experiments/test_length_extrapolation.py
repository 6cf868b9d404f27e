"""Length extrapolation: equal text at every context, the criteria, and the smallest run."""

import json

import numpy as np
import pytest

from experiments import length_extrapolation as experiment
from xlstm_jax.config import ConfigError


def model(*bits):
    return {"bits_per_byte": dict(zip((64, 128, 256), bits, strict=True))}


def test_every_context_is_evaluated_on_the_same_targets():
    cfg = experiment.config("smoke")
    parts = experiment.same_text(cfg, (16, 32, 64), count=1024)
    batches = [part.batch(np.arange(len(part))) for part in parts]
    assert [batch.targets.shape for batch in batches] == [(64, 16), (32, 32), (16, 64)]
    for batch in batches[:-1]:
        np.testing.assert_array_equal(batch.targets.ravel(), batches[-1].targets.ravel())
        np.testing.assert_array_equal(batch.weights.ravel(), batches[-1].weights.ravel())
    assert len(np.unique(batches[-1].index)) == 16


def test_every_context_divides_the_longest_one():
    for contexts in experiment.CONTEXTS.values():
        assert all(contexts[-1] % context == 0 for context in contexts)


def test_steps_have_as_many_tokens_as_those_of_the_comparison():
    cfg = experiment.config("cpu", "Llama")
    assert (cfg.data.seq_len, cfg.data.batch_size) == (64, 64)
    paper = experiment.config("paper", "RWKV-4")
    assert (paper.data.seq_len, paper.data.batch_size, paper.train.lr) == (2048, 512, 2e-4)


def test_the_outcome_depends_on_the_worst_context_and_on_the_last_one():
    flat, hump, rising = model(2.0, 1.9, 2.05), model(2.0, 2.1, 2.0), model(2.0, 2.1, 2.2)
    good = {"xLSTM[1:0]": flat, "xLSTM[7:1]": flat, "Llama": rising}
    assert list(experiment.outcome(good).values()) == [True, True, True]
    bad = {"xLSTM[1:0]": hump, "xLSTM[7:1]": flat, "Llama": flat}
    assert list(experiment.outcome(bad).values()) == [False, True, False]
    assert experiment.outcome({"Mamba": rising}) == {}


def test_an_unknown_model_is_rejected_with_the_known_ones():
    with pytest.raises(ConfigError, match="model='hybrid' is unknown; use one of: xLSTM"):
        experiment.config("cpu", "hybrid")


@pytest.mark.slow
def test_the_smallest_size_evaluates_beyond_the_attention_cache_of_training(
    tmp_path, monkeypatch, one_device
):
    fields = experiment.comparison.MODELS["Llama"]
    attention = experiment.comparison.AttentionConfig(cache_size=32)
    monkeypatch.setitem(experiment.comparison.MODELS, "Llama", fields | dict(attention=attention))
    options = dict(size="smoke", runs=tmp_path / "runs", out=tmp_path / "l.json")
    assert experiment.main(experiment.Options(models=("Llama",), **options)) == 0
    result = json.loads((tmp_path / "l.json").read_text())["models"]["Llama"]
    assert list(result["bits_per_byte"]) == ["16", "32", "64"]
    assert len(set(result["num_tokens"].values())) == 1
    assert sum(b["num_tokens"] for b in result["by_position"]) == result["num_tokens"]["64"]
    assert 0 < (tmp_path / "l.png").stat().st_size < 300 * 1024
