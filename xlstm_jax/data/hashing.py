"""Counter-based random numbers: every draw is a pure function of integers, equal on all machines.

`mix` is the output function of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"). NumPy's generators are streams: draw i of sample n would need a
new generator per sample, and the streams may change between NumPy versions.
"""

import hashlib

import numpy as np
from jaxtyping import Float64, Int64, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, the increment of SplitMix64
_ROUNDS = 5  # of a Feistel network, two half-rounds each; three already look random


def mix(x: UInt64[np.ndarray, "*N"]) -> UInt64[np.ndarray, "*N"]:
    """A bijection of 64-bit integers that decorrelates neighbors."""
    x = x + _GOLDEN  # unsigned arithmetic wraps around, as the algorithm needs
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: int) -> UInt64[np.ndarray, "1"]:
    """A key from any integers, such as (seed, split); `fold` adds more of them."""
    result = np.zeros(1, np.uint64)
    for part in parts:
        result = fold(result, np.full(1, _word(part), np.uint64))
    return result


def _word(part: int) -> int:
    """The integer itself if it fits 64 bits without a sign, else a hash of all its bits."""
    if 0 <= part < 1 << 64:
        return part
    data = part.to_bytes(part.bit_length() // 8 + 1, "big", signed=True)
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def fold(
    keys: UInt64[np.ndarray, "*#N"], data: UInt64[np.ndarray, "*#N"]
) -> UInt64[np.ndarray, "..."]:
    """New keys from keys and counters, broadcast against each other."""
    # The inner mix keeps (key + 1, data) and (key, data + 1) apart.
    return mix(mix(keys) + data)


def below(
    keys: UInt64[np.ndarray, "*N"], bound: int | Int64[np.ndarray, "*N"]
) -> Int64[np.ndarray, "*N"]:
    """Integers uniform in [0, bound), one per key; needs bound < 2^31."""
    # Multiply and shift: uses the high bits and needs no division, unlike a remainder.
    return ((keys >> np.uint64(32)) * np.asarray(bound, np.uint64) >> np.uint64(32)).astype(
        np.int64
    )


def uniform(keys: UInt64[np.ndarray, "*N"]) -> Float64[np.ndarray, "*N"]:
    """Numbers uniform in (0, 1), one per key, of which 2^52 are possible; neither bound is."""
    return ((keys >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def permute(
    index: Int64[np.ndarray, "N"], size: int, keys: UInt64[np.ndarray, "N"]
) -> Int64[np.ndarray, "N"]:
    """Images of indices under a random permutation of range(size), in O(1) memory.

    A Feistel network permutes the range of the next power of two. Values outside [0, size) are
    permuted again until they are inside (cycle walking: Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"), which takes fewer than two passes on average. Indices with equal
    keys share a permutation.
    """
    bits = max(size - 1, 1).bit_length()
    permuted = _feistel(index.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(permuted >= size)).size:
        permuted[outside] = _feistel(permuted[outside], bits, keys[outside])
    return permuted.astype(np.int64)


def _feistel(
    x: UInt64[np.ndarray, "N"], bits: int, keys: UInt64[np.ndarray, "N"]
) -> UInt64[np.ndarray, "N"]:
    """A bijection of `bits`-bit integers: the halves alternately mix in a hash of each other."""
    low_bits = np.uint64((bits + 1) // 2)  # unequal halves where `bits` is odd
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits // 2)) - np.uint64(1)
    high, low = x >> low_bits, x & low_mask
    for _ in range(_ROUNDS):
        keys = mix(keys)  # a new key per round
        high = high ^ (mix(keys ^ low) & high_mask)
        low = low ^ (mix(keys + high) & low_mask)
    return high << low_bits | low
