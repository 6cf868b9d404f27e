"""Batches by step: ramps, streams of sequences, hosts and worker processes."""

import dataclasses

import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import Batch, DataConfig, batches, load
from xlstm_jax.data.batch_sizes import BatchSizes
from xlstm_jax.data.loader import load_all
from xlstm_jax.data.stream import Stream

CFG = DataConfig(source="grammar", seq_len=32, batch_size=8, shuffle_block=4, shuffle_set=8)
MIXTURE = dataclasses.replace(
    CFG,
    sources={"a": "topics", "b": "grammar"},
    weights={"a": 0.7, "b": 0.3},
    shuffle="blocks",
)


@pytest.fixture(scope="module")
def grammar():
    return load(CFG, "train")


def stream(examples, cfg=CFG, ramp=()):
    return Stream(examples, cfg, BatchSizes(cfg.batch_size, ramp))


def test_a_ramp_takes_the_same_sequences_in_the_same_order(grammar):
    ramp = ((0, 0.25), (3, 0.5), (7, 1.0))
    ramped, full = stream(grammar, ramp=ramp), stream(grammar)
    sizes = [len(ramped.index_of(step)) for step in range(9)]
    assert sizes == [2, 2, 2, 4, 4, 4, 4, 8, 8] and ramped.sizes.distinct == {2, 4, 8}
    sequences = [i for step in range(9) for i in ramped.index_of(step)]
    assert sequences == [i for step in range(5) for i in full.index_of(step)][: len(sequences)]
    assert [ramped.sizes.before(step) for step in (0, 3, 7, 9)] == [0, 6, 22, 38]
    assert ramped.batch(3).inputs.shape == (4, 32)


@pytest.mark.parametrize(
    "ramp,message",
    [
        (((1, 0.5),), "increasing steps from 0 on"),
        (((0, 0.5), (0, 1.0)), "increasing steps"),
        (((0, 0.3),), "integer numbers of sequences, got 0.3"),
        (((0, 0.0),), "shares above 0"),
        (((0, 2.0),), "at most 1"),
    ],
)
def test_invalid_ramps_are_rejected(ramp, message):
    with pytest.raises(ConfigError, match=message):
        BatchSizes(8, ramp)


def test_sequences_of_a_stream_continue_from_step_to_step(grammar):
    cfg = dataclasses.replace(CFG, packing="stream")
    batches = [stream(grammar, cfg).batch(step) for step in range(3)]
    for now, after in zip(batches, batches[1:], strict=False):
        np.testing.assert_array_equal(now.targets[:, -1], after.inputs[:, 0])
        np.testing.assert_array_equal(now.index + 1, after.index)
    with pytest.raises(ConfigError, match="batch_ramp must be empty"):
        stream(grammar, cfg, ((0, 0.5),))


def test_sequences_of_a_stream_begin_again_after_their_last_window(grammar):
    cfg = dataclasses.replace(CFG, packing="stream")
    length = len(grammar) // cfg.batch_size
    epoch = [stream(grammar, cfg).index_of(step) for step in range(length)]
    assert len(set(sum(epoch, []))) == length * cfg.batch_size
    for step in (0, 1, length - 1):
        assert stream(grammar, cfg).index_of(5 * length + step) == epoch[step]


def test_ids_of_a_stream_start_at_2_where_a_document_begins_with_the_window(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "{t}"}}\n' for t in ("abc", "abcdefg", "ab"))
    )
    cfg = DataConfig(source=str(tmp_path), seq_len=4, batch_size=1, packing="stream")
    windows = load_all(cfg)
    ids = windows.batch(np.arange(len(windows))).segment_ids
    # Documents of 4, 8 and 3 tokens, each with its end: three windows begin with one.
    assert ids[:, 0].tolist() == [2, 2, 1, 2]
    plain = load_all(dataclasses.replace(cfg, packing="windows"))
    assert plain.batch(np.arange(len(plain))).segment_ids[:, 0].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("cfg", [CFG, MIXTURE], ids=["one", "mixture"])
@pytest.mark.parametrize("host_count", [1, 2, 4])
def test_hosts_share_the_batch_of_one_host(cfg, host_count):
    examples = load(cfg, "train")
    one = stream(examples, cfg)
    for step in (0, 11, 1000):
        hosts = [one.batch(step, host_index=i, host_count=host_count) for i in range(host_count)]
        joined = Batch(*map(np.concatenate, zip(*hosts, strict=True)))
        for a, b in zip(joined, one.batch(step), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_worker_processes_yield_the_batches_of_a_thread(workers):
    examples = load(MIXTURE, "train")
    many = dataclasses.replace(MIXTURE, workers=workers)
    with batches(examples, many, 5, 9) as iterator:
        made = list(iterator)
    assert len(made) == 9
    for step, batch in enumerate(made, 5):
        for a, b in zip(batch, stream(examples, MIXTURE).batch(step), strict=True):
            np.testing.assert_array_equal(a, b)
            assert type(a) is np.ndarray  # no shared memory, which would have to be freed
