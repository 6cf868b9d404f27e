"""Random numbers by counter: every draw is a pure function of integers, the same on any machine.

`mix` is the output function of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"). NumPy's own generators are streams: reaching draw i of sample n
would cost a new generator per sample, and their streams may change between NumPy versions.
"""

import numpy as np
from jaxtyping import Int64, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 5  # two half-rounds each; three already look random, the others are cheap


def mix(x: UInt64[np.ndarray, "*N"]) -> UInt64[np.ndarray, "*N"]:
    """A bijection of 64-bit integers under which neighbours have nothing in common."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: int) -> UInt64[np.ndarray, "1"]:
    """A key for a purpose named by non-negative integers; more are folded in with `fold`."""
    result = np.zeros(1, np.uint64)
    for part in parts:
        result = fold(result, np.full(1, part, np.uint64))
    return result


def fold(
    keys: UInt64[np.ndarray, "*#N"], data: UInt64[np.ndarray, "*#N"]
) -> UInt64[np.ndarray, "..."]:
    """New keys from keys and counters, broadcast against each other."""
    return mix(mix(keys) + data)


def below(keys: UInt64[np.ndarray, "*N"], bound: int) -> Int64[np.ndarray, "*N"]:
    """Integers uniform in [0, bound), one per key; needs bound < 2^31."""
    return ((keys >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


def permute(
    place: Int64[np.ndarray, "N"], size: int, keys: UInt64[np.ndarray, "N"]
) -> Int64[np.ndarray, "N"]:
    """The element at each place of a random permutation of range(size), in O(1) memory.

    A Feistel network permutes the next power of two; what falls outside [0, size) is sent through
    it again until it falls inside (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains"). Fewer than two passes on average. Places with equal keys share a permutation.
    """
    bits = max(size - 1, 1).bit_length()
    result = _feistel(place.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(result >= size)).size:
        result[outside] = _feistel(result[outside], bits, keys[outside])
    return result.astype(np.int64)


def _feistel(
    x: UInt64[np.ndarray, "N"], bits: int, keys: UInt64[np.ndarray, "N"]
) -> UInt64[np.ndarray, "N"]:
    """A bijection of `bits`-bit numbers: each part in turn is changed by a hash of the other."""
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits // 2)) - np.uint64(1)
    high, low = x >> low_bits, x & low_mask
    for _ in range(_ROUNDS):
        keys = mix(keys)
        high = high ^ (mix(keys ^ low) & high_mask)
        low = low ^ (mix(keys + high) & low_mask)
    return high << low_bits | low
