"""Numbers that look random and are functions of their place alone: what makes data order arithmetic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15

Words = NDArray[np.uint64]


def mix(word: int) -> int:
    """A permutation of 64-bit words that leaves nothing of their order (Steele, Lea, Flood 2014: SplitMix64)."""
    word = (word + _GOLDEN) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def mix_all(words: Words) -> Words:
    """`mix` of many."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(_GOLDEN)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def word(*place: int) -> int:
    """64 bits that belong to a place: a seed and any whole numbers after it."""
    found = 0
    for number in place:
        found = mix(found ^ (number & MASK))
    return found


def uniform(*place: int) -> float:
    """A number from 0 to under 1 that belongs to a place."""
    return (word(*place) >> 11) / 2**53


def permuted(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Where a permutation of `range(size)`, one for each key, takes each index. It is never held: a Feistel network
    over the next power of four, gone through again where it leads outside."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = [np.uint64(word(key, turn)) for turn in range(6)]

    def through(x: Words) -> Words:
        left, right = x >> np.uint64(half), x & low
        for k in keys:
            left, right = right, left ^ (mix_all(right ^ k) & low)
        return (left << np.uint64(half)) | right

    out = through(index.astype(np.uint64))
    while (outside := out >= np.uint64(size)).any():
        out[outside] = through(out[outside])
    return out.astype(np.int64)
