"""Mixtures: shares, ranks without gaps, and schedules."""

import dataclasses

import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import DataConfig, batch_at, load
from xlstm_jax.data.batch_sizes import BatchSizes
from xlstm_jax.data.mixture import Mixture, Schedule
from xlstm_jax.data.stream import Stream

WEIGHTS = [
    ((0.8, 0.2),),
    ((1.0, 0.0, 3.3, 1e-4),),
    ((1, 1, 1, 1, 1, 1, 1),),
    ((1e-5,) * 40 + (1.0,) * 3,),
    ((5.0,),),
]
CFG = DataConfig(
    sources={"a": "topics", "b": "grammar"},
    weights={"a": 0.7, "b": 0.3},
    seq_len=32,
    batch_size=8,
)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", [0, -1])
def test_shares_of_100_000_sequences_are_within_a_thousandth_of_the_weights(weights, seed):
    schedule = Schedule(weights, (0,), seed)
    source, _ = schedule.draw(np.arange(100_000))
    shares = np.bincount(source, minlength=len(weights[0])) / len(source)
    np.testing.assert_allclose(shares, np.array(weights[0]) / sum(weights[0]), atol=1e-3)
    assert not shares[np.array(weights[0]) == 0].any()


@pytest.mark.parametrize("starts", [(0,), (0, 1), (0, 5000), (0, 4096), (0, 3, 50_001)])
def test_the_rank_counts_the_earlier_sequences_of_a_source(starts):
    tables = ((0.8, 0.15, 0.05), (0.1, 0.1, 0.8), (0.0, 1.0, 0.0))
    schedule = Schedule(tables[: len(starts)], starts, 1)
    source, rank = schedule.draw(np.arange(70_000))
    for number in range(3):
        mine = rank[source == number]
        assert (mine == np.arange(len(mine))).all()
    for count in (0, 1, 4096, 5000, 70_000):
        drawn = np.bincount(source[:count], minlength=3)
        assert schedule.counts(count) == drawn.tolist()


def test_draws_do_not_depend_on_what_else_is_drawn():
    schedule = Schedule(((0.5, 0.3, 0.2), (0.1, 0.1, 0.8)), (0, 5000), 1)
    sequence = np.random.default_rng(0).integers(0, 10_000, 300)
    together = np.array(schedule.draw(sequence))
    alone = [np.ravel(schedule.draw(np.array([i]))) for i in sequence]
    assert (together == np.array(alone).T).all()


def test_a_phase_begins_at_its_step_and_uses_its_weights():
    later = dataclasses.replace(CFG, weight_schedule=((100, {"a": 0.0, "b": 1.0}),))
    stream = Stream(load(later, "train"), later, BatchSizes(8, ((0, 0.5), (50, 1.0))))
    offset = stream.examples.offsets[1]
    assert any(i < offset for i in stream.index_of(99)) and len(stream.index_of(49)) == 4
    assert all(i >= offset for step in range(100, 120) for i in stream.index_of(step))
    counts = stream.counts(120)
    assert counts["sequences_a"] == stream.counts(100)["sequences_a"]
    assert sum(counts.values()) == 50 * 4 + 70 * 8


def test_windows_of_a_mixture_are_those_of_its_sources():
    mixture = load(CFG, "train")
    assert isinstance(mixture, Mixture)
    parts = {
        name: load(DataConfig(source=path, seq_len=32), "train")
        for name, path in CFG.sources.items()
    }
    assert len(mixture) == sum(map(len, parts.values()))
    batch = batch_at(mixture, CFG, 3)
    for i, index in enumerate(batch.index):
        name, start = ("a", 0) if index < len(parts["a"]) else ("b", len(parts["a"]))
        expected = parts[name].batch(np.array([index - start]))
        for leaf, one in zip(batch[:-1], expected[:-1], strict=True):
            np.testing.assert_array_equal(leaf[i], one[0])
    assert set(mixture.description) == {"a", "b"}


def test_sources_of_equal_size_have_different_orders():
    sources = {"a": "grammar", "b": "grammar"}
    cfg = dataclasses.replace(CFG, sources=sources, weights=dict.fromkeys(sources, 1))
    mixture = load(cfg, "train")
    stream = Stream(mixture, cfg, BatchSizes(cfg.batch_size))
    index = np.concatenate([stream.index_of(step) for step in range(20)])
    first, second = index[index < mixture.offsets[1]], index[index >= mixture.offsets[1]]
    count = min(len(first), len(second))
    assert (first[:count] == second[:count] - mixture.offsets[1]).mean() < 0.5


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"weights": {"a": 1.0}}, "weights must have a weight for each of a, b"),
        ({"weights": {"a": 1.0, "b": -1.0}}, "weights must be 0, or at least 1e-5 of their sum"),
        ({"weights": {"a": 0.0, "b": 0.0}}, "not all 0"),
        ({"weights": {"a": float("nan"), "b": 1.0}}, "data.weights"),
        ({"sources": {}}, "need data.sources"),
        ({"weight_schedule": ((5, {"a": 1, "b": 1}), (5, {"a": 1, "b": 1}))}, "increasing steps"),
        ({"weight_schedule": ((0, {"a": 1, "b": 1}),)}, "increasing steps from 1 on"),
        ({"weight_schedule": ((5, {"a": 1}),)}, "schedule from step 5 on must have a weight"),
        ({"packing": "stream"}, "must have one source"),
        ({"eval_sets": {"valid": "topics"}}, "other than train and valid"),
        ({"eval_sets": {"a b": "topics"}}, "letters, digits and underscores"),
    ],
)
def test_invalid_mixtures_are_rejected(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CFG, **changes)
