"""Randomness by counter."""

import numpy as np
import pytest

from xlstm_jax.data import hashing


def repeated(size, *parts):
    return np.repeat(hashing.key(*parts), size)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 63, 64, 65, 1000, 4097])
def test_a_permutation_holds_every_element_once(size):
    order = hashing.permute(np.arange(size), size, repeated(size, 3, 1))
    assert sorted(order) == list(range(size))


def test_each_key_has_its_own_permutation():
    orders = {
        tuple(hashing.permute(np.arange(50), 50, repeated(50, seed, epoch)))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_places_may_be_asked_for_one_at_a_time_and_with_mixed_keys():
    size = 77
    whole = [hashing.permute(np.arange(size), size, repeated(size, e)) for e in range(2)]
    keys = np.concatenate([hashing.key(1), hashing.key(0), hashing.key(1)])
    some = hashing.permute(np.array([76, 5, 0]), size, keys)
    np.testing.assert_array_equal(some, [whole[1][76], whole[0][5], whole[1][0]])


def test_a_permutation_of_a_trillion_needs_no_memory():
    size = 10**12
    order = hashing.permute(np.arange(1000), size, repeated(1000, 0))
    assert len(set(order)) == 1000
    assert 0 <= order.min() and order.max() < size


@pytest.mark.parametrize("size", [5, 12])
def test_every_element_is_equally_likely_at_every_place(size):
    epochs = 4000
    keys = hashing.fold(hashing.key(0), np.arange(epochs, dtype=np.uint64))
    places = np.tile(np.arange(size), epochs)
    elements = hashing.permute(places, size, np.repeat(keys, size))
    counts = np.bincount(places * size + elements, minlength=size**2)
    expected = epochs / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_draws_below_a_bound_are_uniform_and_reach_both_ends():
    keys = hashing.fold(hashing.key(0), np.arange(70_000, dtype=np.uint64))
    counts = np.bincount(hashing.below(keys, 7), minlength=7)
    assert len(counts) == 7
    np.testing.assert_allclose(counts, 10_000, rtol=0.05)


def test_the_numbers_are_those_of_splitmix64():
    """The first outputs for seed 0, as published with the algorithm."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    states = np.arange(3, dtype=np.uint64) * golden
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hashing.mix(states).tolist() == expected
