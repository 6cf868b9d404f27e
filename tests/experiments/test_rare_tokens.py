"""Rare tokens: the criteria, and a run at the smallest size."""

import json

import numpy as np
import pytest

from experiments import rare_tokens
from xlstm_jax.config import ConfigError
from xlstm_jax.evaluate.position import Bucket
from xlstm_jax.flops import count_params


def model(*buckets, pooled):
    """A model with (loss, number of tokens) of each bucket."""
    described = [{"nats_per_token": loss, "num_tokens": count} for loss, count in buckets]
    return {"buckets": described, "pooled": {"nats_per_token": pooled}}


def test_models_have_equal_parameters():
    counts = [count_params(rare_tokens.config("cpu", name).model) for name in rare_tokens.MODELS]
    assert max(counts) <= 1.01 * min(counts)


def test_the_mean_of_the_buckets_must_be_the_pooled_loss():
    buckets = (None, 0), (6.0, 1_000), (3.0, 2_000)
    good, bad = model(*buckets, pooled=4.0), model(*buckets, pooled=4.001)
    assert rare_tokens.mean_of_buckets(good) == pytest.approx(4.0)
    name = "the weighted mean of the buckets is the pooled loss"
    assert rare_tokens.outcome({"a": good})[name]
    assert not rare_tokens.outcome({"a": good, "b": bad})[name]


def test_losses_are_compared_only_between_buckets_with_enough_tokens():
    few = rare_tokens.MIN_TOKENS - 1
    assert rare_tokens.falls(model((1.0, few), (6.0, 500), (3.0, 500), pooled=0))
    assert not rare_tokens.falls(model((1.0, few + 1), (6.0, 500), (3.0, 500), pooled=0))


def test_a_bucket_has_its_token_ids_and_has_no_loss_without_targets():
    counts = np.array([0, 1, 5, 10, 2000])
    one = rare_tokens.describe(Bucket(1, 10, 2.5, 7), counts)
    assert (one["label"], one["num_ids"], one["nats_per_token"]) == ("1-9", 2, 2.5)
    last = rare_tokens.describe(Bucket(1000, None, float("nan"), 0), counts)
    assert (last["num_ids"], last["nats_per_token"]) == (1, None)


def test_an_unknown_model_is_rejected_with_the_known_ones():
    with pytest.raises(ConfigError, match="model='Mamba' is unknown; use one of: Llama"):
        rare_tokens.config("cpu", "Mamba")


@pytest.mark.slow
def test_the_smallest_size_trains_a_tokenizer_and_writes_a_result(tmp_path, one_device):
    pytest.importorskip("tokenizers")
    options = dict(size="smoke", runs=tmp_path / "runs", out=tmp_path / "r.json")
    assert rare_tokens.main(rare_tokens.Options(models=("LSTM (block)",), **options)) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["outcome"]["the weighted mean of the buckets is the pooled loss"]
    buckets = result["models"]["LSTM (block)"]["buckets"]
    total = result["models"]["LSTM (block)"]["pooled"]["num_tokens"]
    assert sum(bucket["num_tokens"] for bucket in buckets) == total
    assert sum(bucket["num_ids"] for bucket in buckets) == rare_tokens.VOCAB_SIZE["smoke"]
    assert 0 < (tmp_path / "r.png").stat().st_size < 300 * 1024
