"""Batches by step: epochs, resuming, and sharing between hosts."""

import dataclasses
import inspect
import itertools

import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import (
    SPLITS,
    Batch,
    DataConfig,
    Windows,
    batch_at,
    batches,
    eval_batches,
    load,
    tokenizers,
)
from xlstm_jax.data.loader import eval_index
from xlstm_jax.data.prefetch import BatchIterator, by_step
from xlstm_jax.data.shards.store import ArrayTokens

BYTE = tokenizers.get("byte")
CFG = DataConfig(seq_len=8, batch_size=6)

# Seed -> windows of step 7 of 60, from an earlier version: its runs resume with the same batches.
ORDERS = {
    0: [49, 9, 44, 11, 28, 45],
    5: [14, 55, 57, 43, 4, 26],
    2**32 - 1: [17, 25, 7, 27, 10, 42],
    2**64 - 1: [55, 16, 30, 51, 6, 41],
}


def make_windows(num_windows, seq_len=CFG.seq_len):
    tokens = np.arange(num_windows * seq_len + 1).astype(np.uint16) % 256
    tokens[-1] = BYTE.eos_id
    ends = np.flatnonzero(tokens == BYTE.eos_id) + 1
    return Windows(ArrayTokens(tokens, ends), seq_len, BYTE, {})


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def indices(windows, cfg, num_steps):
    return np.concatenate([batch_at(windows, cfg, step).index for step in range(num_steps)])


@pytest.mark.parametrize("num_windows", [6, 7, 20, 101])
def test_every_epoch_contains_every_window_once(num_windows):
    windows = make_windows(num_windows)
    epochs = 6  # the batch size, so that the last batch ends with an epoch
    order = indices(windows, CFG, num_windows).reshape(epochs, num_windows)
    for epoch in order:
        assert sorted(epoch) == list(range(num_windows))


def test_the_order_of_windows_depends_on_epoch_and_seed():
    windows = make_windows(60)
    orders = [indices(windows, dataclasses.replace(CFG, seed=seed), 20) for seed in (0, 1)]
    epochs = {tuple(epoch) for order in orders for epoch in order.reshape(2, 60)}
    assert len(epochs) == 4
    assert tuple(range(60)) not in epochs


def test_every_bit_of_the_seed_changes_the_order():
    windows = make_windows(60)
    seeds = [5, -5, 2**33 + 5, 2**63 + 5, 2**64 + 5, 2**65 + 5, 2**70, 2**500]
    orders = {tuple(indices(windows, dataclasses.replace(CFG, seed=s), 10)) for s in seeds}
    assert len(orders) == len(seeds)


def test_the_order_of_windows_is_that_of_earlier_versions():
    windows = make_windows(60)
    for seed, expected in ORDERS.items():
        batch = batch_at(windows, dataclasses.replace(CFG, seed=seed), 7)
        assert batch.index.tolist() == expected


def test_sequences_of_a_batch_are_the_windows_of_its_index():
    windows = make_windows(50)
    batch = batch_at(windows, CFG, 3)
    for inputs, targets, index in zip(batch.inputs, batch.targets, batch.index, strict=True):
        window = windows.store.tokens[index * CFG.seq_len :][: CFG.seq_len + 1]
        np.testing.assert_array_equal(inputs, window[:-1])
        np.testing.assert_array_equal(targets, window[1:])


@pytest.mark.parametrize("source", ["text", "parity"])
@pytest.mark.parametrize("start", [0, 1, 9, 1_000_000])
def test_the_iterator_yields_the_batches_of_its_steps_from_any_start(source, start):
    """A resumed run therefore gets the batches of an uninterrupted one."""
    examples = (
        make_windows(50)
        if source == "text"
        else load(dataclasses.replace(CFG, source="parity"), "train")
    )
    with batches(examples, CFG, start) as iterator:
        for step in range(start, start + 12):
            assert_equal(next(iterator), batch_at(examples, CFG, step))


def test_a_worker_that_was_killed_is_an_error_of_the_machine():
    def end():
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")
        yield

    with BatchIterator(by_step(lambda step: step), 0, 3) as batches:
        batches._iterator.close()
        batches._iterator = end()
        with pytest.raises(ChildProcessError, match="a worker process of the data ended"):
            next(batches)


def test_the_iterator_ends_after_num_steps_and_can_be_closed_twice():
    iterator = batches(make_windows(50), CFG, 2, num_steps=3)
    assert [tuple(batch.index) for batch in iterator] == [
        tuple(batch_at(make_windows(50), CFG, step).index) for step in (2, 3, 4)
    ]
    iterator.close()
    iterator.close()
    assert next(iterator, None) is None


def test_an_error_in_the_prefetch_thread_is_raised_in_the_caller():
    class Broken(Windows):
        def batch(self, index):
            if index[0] == unreadable:
                raise OSError("read error")
            return super().batch(index)

    windows = make_windows(50)
    unreadable = batch_at(windows, CFG, 2).index[0]
    broken = Broken(windows.store, windows.seq_len, windows.tokenizer, {})
    with batches(broken, CFG) as iterator, pytest.raises(OSError, match="read error"):
        list(itertools.islice(iterator, 5))


@pytest.mark.parametrize("host_count", [1, 2, 3, 6])
def test_the_blocks_of_all_hosts_concatenate_to_the_global_batch(host_count):
    windows = make_windows(20)
    for step in (0, 3, 7):  # step 3 has sequences of two epochs
        blocks = [
            batch_at(windows, CFG, step, host_index=host, host_count=host_count)
            for host in range(host_count)
        ]
        joined = Batch(*(np.concatenate(leaves) for leaves in zip(*blocks, strict=True)))
        assert_equal(joined, batch_at(windows, CFG, step))


@pytest.mark.parametrize("num_windows", [1, 5, 6, 7, 12])
def test_evaluation_covers_every_window_once_in_order_and_pads_the_last_batch(num_windows):
    windows = make_windows(num_windows)
    all_batches = list(eval_batches(windows, CFG))
    index = [i for batch in all_batches for i in batch.index]
    assert index == [*range(num_windows)] + [-1] * (-num_windows % CFG.batch_size)
    assert sum(batch.weights.sum() for batch in all_batches) == windows.store.num_tokens - 1
    for batch in all_batches:
        assert batch.inputs.shape == (CFG.batch_size, CFG.seq_len)
        assert (batch.weights[batch.index == -1] == 0).all()
        assert (batch.segment_ids[batch.index == -1] == 0).all()


def test_max_batches_samples_the_windows_evenly():
    index = [batch.index.tolist() for batch in eval_batches(make_windows(50), CFG, max_batches=2)]
    assert index == [[2, 6, 10, 14, 18, 22], [27, 31, 35, 39, 43, 47]]
    assert len(list(eval_batches(make_windows(5), CFG, max_batches=2))) == 1


@pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 3), (7, 7), (7, 9), (1000, 64)])
def test_eval_index_takes_the_middle_of_every_part(total, count):
    index = eval_index(total, count)
    assert len(index) == len(set(index.tolist())) == min(total, count)
    part_of_index = index * len(index) // total
    assert part_of_index.tolist() == list(range(len(index)))
    assert abs(index.mean() - (total - 1) / 2) <= 0.5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seq_len", 0, r"data\.seq_len must be at least 1, got 0; the default is"),
        ("batch_size", 0, r"data\.batch_size must be at least 1, got 0; the default is"),
        ("pattern", "", r"data\.pattern must match names of files, got ''; use None"),
        ("pattern", "{,*.txt}", r"data\.pattern must match names of files, got '\{,\*\.txt\}'"),
        ("pattern", "{a,b}" * 40, r"data\.pattern must stand for at most 100 patterns, got"),
        ("min_len", 1, r"data\.min_len must be at least 2, got 1; the default is"),
        (
            "num_eval_samples",
            0,
            r"data\.num_eval_samples must be at least 1, got 0; the default is",
        ),
    ],
)
def test_an_invalid_field_is_rejected_when_the_config_is_built(field, value, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{field: value})


def test_an_unknown_tokenizer_is_rejected_when_data_are_loaded():
    """And not before: a run keeps a copy of its tokenizer, whose original may be gone."""
    cfg = DataConfig(source="grammar", tokenizer="words")
    with pytest.raises(ConfigError, match=r"tokenizer='words' is not known; use one of: 'byte'"):
        load(cfg, "train")


def test_a_batch_larger_than_the_data_is_rejected():
    message = r"data\.batch_size=6 must be at most the 5 windows of .*make the batch or .* smaller"
    with pytest.raises(ConfigError, match=message):
        batch_at(make_windows(5), CFG, 0)
    with pytest.raises(ConfigError, match=message):
        batches(make_windows(5), CFG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"host_count": 4}, "batch_size=6 must be a multiple of host_count=4.*; change"),
        ({"host_count": 0}, "batch_size=6 must be a multiple of host_count=0.*; change"),
        ({"host_index": 2, "host_count": 2}, r"host_index must be in 0\.\.1 .*got 2; pass"),
        ({"host_index": -1, "host_count": 2}, r"host_index must be in 0\.\.1 .*got -1; pass"),
    ],
)
def test_hosts_that_cannot_share_a_batch_are_rejected(arguments, message):
    for call in (
        lambda: batch_at(make_windows(50), CFG, 0, **arguments),
        lambda: batches(make_windows(50), CFG, **arguments),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_a_negative_step_is_rejected():
    with pytest.raises(ConfigError, match="step must be at least 0, got -1; 0 is the first"):
        batch_at(make_windows(50), CFG, -1)


def test_an_unknown_split_is_rejected_with_the_known_splits():
    with pytest.raises(ConfigError, match="split='dev' is not known; use one of: train, valid"):
        inspect.unwrap(load)(CFG, "dev")
    assert SPLITS == ("train", "valid", "test")
