"""Validation of configs of runs."""

import dataclasses
import json

import pytest

from xlstm_jax.config import ConfigError, from_dict, to_dict
from xlstm_jax.data import load
from xlstm_jax.train import ExperimentConfig, TrainConfig
from xlstm_jax.train.config import check_vocabulary


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(steps=0), ["train.steps", "at least 1", "0"]),
        (dict(lr=0.0), ["train.lr", "above 0"]),
        (dict(lr=float("nan")), ["train.lr", "nan"]),
        (dict(end_factor=0.0), ["train.end_factor", "at most 1"]),
        (dict(warmup_steps=1.5), ["train.warmup_steps", "1.5", "fraction"]),
        (dict(cooldown_steps=-1), ["train.cooldown_steps", "-1"]),
        (dict(steps=10, warmup_steps=6, cooldown_steps=5), ["train.steps", "10", "6", "5"]),
        (dict(steps=10, schedule="wsd", decay_steps=11), ["train.steps", "decay_steps 11"]),
        (dict(grad_clip=0.0), ["train.grad_clip", "above 0"]),
        (dict(b2=1.0), ["train.b2", "below 1"]),
        (dict(accumulation=0), ["train.accumulation", "at least 1"]),
        (dict(loss_chunk=0), ["train.loss_chunk", "at least 1"]),
        (dict(max_consecutive_skips=0), ["train.max_consecutive_skips"]),
        (dict(decay_pattern="("), ["train.decay_pattern", "'('", "regular expression"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_an_invalid_value_raises_a_one_line_error(fields, words):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**fields)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith(".")


def test_an_unknown_schedule_is_rejected():
    with pytest.raises(ConfigError, match="schedule must be one of .*'wsd', got 'a'"):
        from_dict(TrainConfig, {"schedule": "a"})


def test_experiment_config_round_trips_through_json(experiment):
    cfg = experiment(warmup_steps=3, grad_clip=None, loss_chunk=64)
    assert from_dict(ExperimentConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg


def test_accumulation_must_divide_the_batch_size(experiment):
    with pytest.raises(ConfigError, match="data.batch_size must be a multiple.*4 and 3"):
        experiment(accumulation=3)


def test_the_vocabulary_of_the_model_must_cover_the_data(experiment):
    cfg = experiment()
    examples = load(cfg.data, "train")
    check_vocabulary(cfg, examples)
    small = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=200))
    with pytest.raises(ConfigError, match="model.vocab_size must be at least 257.*got 200"):
        check_vocabulary(small, examples)
