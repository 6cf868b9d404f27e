"""Counter-based random numbers."""

import numpy as np
import pytest

from xlstm_jax.data import hashing


def repeated(size, *parts):
    return np.repeat(hashing.key(*parts), size)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 63, 64, 65, 1000, 4097])
def test_a_permutation_contains_every_element_once(size):
    order = hashing.permute(np.arange(size), size, repeated(size, 3, 1))
    assert sorted(order) == list(range(size))


def test_each_key_has_its_own_permutation():
    orders = {
        tuple(hashing.permute(np.arange(50), 50, repeated(50, seed, epoch)))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_indices_can_be_permuted_individually_and_with_mixed_keys():
    size = 77
    permutations = [hashing.permute(np.arange(size), size, repeated(size, e)) for e in range(2)]
    keys = np.concatenate([hashing.key(1), hashing.key(0), hashing.key(1)])
    images = hashing.permute(np.array([76, 5, 0]), size, keys)
    expected = [permutations[1][76], permutations[0][5], permutations[1][0]]
    np.testing.assert_array_equal(images, expected)


def test_a_permutation_of_a_trillion_elements_takes_constant_memory():
    size = 10**12
    order = hashing.permute(np.arange(1000), size, repeated(1000, 0))
    assert len(set(order)) == 1000
    assert 0 <= order.min() and order.max() < size


@pytest.mark.parametrize("size", [5, 12])
def test_every_index_is_equally_likely_to_map_to_every_element(size):
    epochs = 4000
    keys = hashing.fold(hashing.key(0), np.arange(epochs, dtype=np.uint64))
    indices = np.tile(np.arange(size), epochs)
    elements = hashing.permute(indices, size, np.repeat(keys, size))
    counts = np.bincount(indices * size + elements, minlength=size**2)
    expected = epochs / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_below_is_uniform_and_reaches_both_ends_of_its_range():
    keys = hashing.fold(hashing.key(0), np.arange(70_000, dtype=np.uint64))
    counts = np.bincount(hashing.below(keys, 7), minlength=7)
    assert len(counts) == 7
    np.testing.assert_allclose(counts, 10_000, rtol=0.05)


def test_mix_is_the_output_function_of_splitmix64():
    """The first outputs for seed 0, as published with the algorithm."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    states = np.arange(3, dtype=np.uint64) * golden
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hashing.mix(states).tolist() == expected
