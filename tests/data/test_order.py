"""Orders of windows: every window once an epoch, and blocks that are read once."""

import collections

import numpy as np
import pytest

from xlstm_jax.data import hashing
from xlstm_jax.data.order import Order

# (windows, windows of a block, blocks of a set): with and without a partial block or a last set.
SIZES = [
    (1000, 10, 5),
    (1003, 10, 5),
    (1003, 10, 200),
    (12_345, 16, 8),
    (7, 10, 3),
    (101, 100, 2),
    (99, 100, 1),
    (100, 1, 1),
    (5000, 7, 3),
]


def epoch(order, number=0):
    return order.window(np.arange(order.size) + number * order.size)


@pytest.mark.parametrize("size,block,set_size", SIZES)
@pytest.mark.parametrize("shuffle", ["blocks", "full", "auto", "none"])
def test_every_epoch_has_every_window_once(shuffle, size, block, set_size):
    order = Order(size, (3,), shuffle, block, set_size)
    for number in (0, 1, 1000):
        assert sorted(epoch(order, number)) == list(range(size))


@pytest.mark.parametrize("size,block,set_size", SIZES)
def test_a_reader_that_keeps_one_set_reads_every_block_once(size, block, set_size):
    cached, reads = collections.OrderedDict(), 0
    for window in epoch(Order(size, (3,), "blocks", block, set_size)):
        number = window // block
        reads += number not in cached
        cached[number] = True
        cached.move_to_end(number)
        if len(cached) > set_size:
            cached.popitem(last=False)
    assert reads == -(-size // block)


def test_the_order_is_a_function_of_seed_epoch_and_position():
    order = Order(1003, (3,), "blocks", 10, 5)
    position = np.random.default_rng(0).integers(0, 50_000, 500)
    one_by_one = [int(order.window(np.array([p]))[0]) for p in position]
    assert order.window(position).tolist() == one_by_one
    orders = [epoch(order), epoch(order, 1), epoch(Order(1003, (4,), "blocks", 10, 5))]
    assert len({tuple(windows) for windows in orders}) == 3


def test_auto_is_a_full_permutation_where_one_set_holds_all_windows():
    for size, expected in ((1000, "full"), (1001, "blocks")):
        auto = Order(size, (0,), "auto", 10, 100)
        assert (epoch(auto) == epoch(Order(size, (0,), expected, 10, 100))).all()
    keys = hashing.fold(hashing.key(0), np.zeros(50, np.uint64))
    full = Order(50, (0,), "full", 10, 100)
    assert (epoch(full) == hashing.permute(np.arange(50), 50, keys)).all()


def test_blocks_are_mixed_within_their_set_and_sets_differ_between_epochs():
    order = Order(64 * 1000, (0,), "blocks", 64, 100)
    blocks = epoch(order).reshape(10, 6400) // 64  # sets
    for one in blocks:
        assert len(np.unique(one)) == 100
        # Neighbors come from different blocks, and the blocks from everywhere.
        assert (one[1:] == one[:-1]).mean() < 0.03
        assert np.unique(one).std() > 200
    assert set(blocks[0]) != set((epoch(order, 1).reshape(10, 6400) // 64)[0])


def test_the_partial_block_is_not_always_in_the_same_set():
    order = Order(1003, (0,), "blocks", 10, 5)
    sets = {int(np.flatnonzero(epoch(order, n) == 1002)[0]) // 50 for n in range(30)}
    assert len(sets) > 8


def test_windows_are_permuted_differently_in_every_set():
    order = Order(64 * 100, (0,), "blocks", 64, 10)
    sets = epoch(order).reshape(10, 640)
    blocks = {tuple(np.unique(one // 64, return_inverse=True)[1]) for one in sets}
    offsets = {tuple(one % 64) for one in sets}
    assert len(blocks) == len(offsets) == 10
