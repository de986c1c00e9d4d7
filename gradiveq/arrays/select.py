"""Which elements of a vector are large: exact top-k and threshold, in one pass over the memory where that can be.

Magnitudes are compared as integers: float32 bit patterns without the sign order like the magnitudes, denormals and
infinities included, and ±0 are equal.

**Top-k** without sorting, or even partitioning, the vector:

    1. 2^15 elements, one at a pseudo-random place of each of as many equal stretches, give a bound that the k-th
       largest magnitude is hardly ever below: the sample's element of rank r, four standard deviations beyond the
       r = 2^15·k/n that is expected.
    2. One pass collects the indices of all magnitudes >= bound; about 1.2·k of them for k = n/100.
    3. A partition of those few, or of those that a like bound from above leaves of them, gives the k-th magnitude.

Whether the sample misled shows in step 2: fewer than k are left, or far more than expected. Too many are usually equal
to the bound (a constant vector, zeros, few distinct values), so that fewer than k are larger and the bound itself is
the k-th magnitude. In all other cases the whole vector is partitioned. So the result never depends on the sample, only
the time does: O(n) in any case, as NumPy's partition is.

**Cost.** `python -m bench.compressor_throughput` compares with `torch.topk` and with copying the vector.
"""

from __future__ import annotations

from math import ceil, floor, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from gradiveq.arrays.bits import UInt32
from gradiveq.arrays.float32 import Float32
from gradiveq.arrays.jit import jit

_MAGNITUDE = np.int32(0x7FFFFFFF)
_LARGEST = 0x7FFFFFFF
_SAMPLE = 1 << 15
_SHORT = 1 << 12  # up to here a partition of all is as fast
_BLOCK = 1024  # elements that are compared before any is collected; a multiple of 8
_FEW = _BLOCK // 32  # of them to be collected: it is faster to look for them than to go through all

Int32 = npt.NDArray[np.int32]
_PATTERNS = types.Array(types.int32, 1, "C", readonly=True)


def num_kept(length: int, ratio: float, count: int | None) -> int:
    """Number of elements that a sparsifier keeps: `count`, or the fraction `ratio` of them but at least 1."""
    kept = max(1, round(ratio * length)) if count is None else count
    return min(kept, length)


def check_kept(ratio: float, count: int | None) -> None:
    """Raise ValueError unless `num_kept` can do with these."""
    if not 0 < ratio <= 1:
        raise ValueError(f"`ratio` is the fraction of the elements to keep, in (0, 1], got {ratio}")
    if count is not None and count < 1:
        raise ValueError(f"`count`, of the elements to keep, must be at least 1, got {count}")


def top_k(values: Float32, k: int) -> tuple[UInt32, Float32]:
    """The k elements of largest magnitude, in their order; of equal ones the first.

    The same indices as `np.sort(np.argsort(-abs(values), kind="stable")[:k])`.

    Args:
        values: contiguous float32 of shape (length,). Not modified.
        k: of them; all if there are fewer.
    Returns:
        Their indices, uint32 of shape (min(k, length),), ascending, and the elements.
    """
    length = len(values)
    if k <= 0:
        return np.empty(0, np.uint32), np.empty(0, np.float32)
    if k >= length:
        return np.arange(length, dtype=np.uint32), values.copy()
    patterns = values.view(np.int32)
    size = min(_SAMPLE, length // 8)
    expected = size * k / length
    margin = 4 * sqrt(expected) + 8
    rank = ceil(expected + margin)
    if length > _SHORT and rank < size:
        sample = np.empty(size, np.int32)
        _take_sample(patterns, sample)
        upper_rank = max(1, floor(expected - margin))
        sample.partition((size - rank, size - upper_rank))
        bound, upper_bound = int(sample[size - rank]), int(sample[size - upper_rank])
        room = ceil((rank + 6 * sqrt(rank)) * length / size) + 1
        indices, collected = np.empty(room, np.uint32), np.empty(room, np.int32)
        found = _collect(patterns, bound, indices, collected)
        if found < 0:
            found = _collect(patterns, bound + 1, indices, collected)
            if 0 <= found < k:
                places = _first_above(patterns, bound, k)
                return places, values.take(places)
        if found >= k:
            places = _first_above(collected[:found], _kth(collected[:found], k, upper_bound), k)
            return indices.take(places), collected.take(places).view(np.float32)
    places = _first_above(patterns, _kth(patterns, k), k)
    return places, values.take(places)


def at_least(values: Float32, bound: np.float32) -> tuple[UInt32, Float32]:
    """The elements whose magnitude is >= bound, in their order.

    Args:
        values: contiguous float32 of shape (length,). Not modified.
        bound: not negative; infinity for none.
    Returns:
        Their indices, uint32 of shape (found,), ascending, and the elements.
    """
    # Room for as many as there could be: what isn't written takes no memory, and is given back.
    indices, collected = np.empty(len(values) + 1, np.uint32), np.empty(len(values) + 1, np.int32)
    found = _collect(values.view(np.int32), int(abs(np.float32(bound)).view(np.int32)), indices, collected)
    indices.resize(found, refcheck=False)
    collected.resize(found, refcheck=False)
    return indices, collected.view(np.float32)


def _kth(patterns: Int32, k: int, upper_bound: int = _LARGEST) -> int:
    """The k-th largest magnitude, by a partition of all, or of those that are <= `upper_bound` if it is there."""
    magnitudes = patterns & _MAGNITUDE
    lower = magnitudes[magnitudes <= upper_bound]
    larger = len(magnitudes) - len(lower)
    if larger < k:
        magnitudes, k = lower, k - larger
    magnitudes.partition(len(magnitudes) - k)
    return int(magnitudes[len(magnitudes) - k])


def _first_above(patterns: Int32, kth: int, k: int) -> UInt32:
    """Indices of the k largest magnitudes, given that the k-th of them is `kth`."""
    indices = np.empty(k + 1, np.uint32)
    _collect_ties(patterns, kth, indices)
    return indices[:k]


@jit(types.void(_PATTERNS, types.int32[::1]), cache=True)
def _take_sample(patterns: Any, sample: Any) -> None:
    """A magnitude from a pseudo-random place of each of len(sample) equal stretches; the same in every call."""
    size = np.uint64(len(sample))
    length = np.uint64(len(patterns))
    for i in range(len(sample)):
        first = np.uint64(i) * length // size
        width = np.uint64(i + 1) * length // size - first
        random = np.uint64(i + 1) * np.uint64(0x9E3779B97F4A7C15)
        random = (random ^ (random >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        sample[i] = patterns[first + ((random >> np.uint64(32)) * width >> np.uint64(32))] & _MAGNITUDE


@jit(types.int64(_PATTERNS, types.int32, types.uint32[::1], types.int32[::1]), cache=True)
def _collect(patterns: Any, bound: Any, indices: Any, collected: Any) -> Any:
    """Write the elements of magnitude >= bound and their indices, and return how many.

    -1 if there is no room for one more than that.
    """
    found = np.uint64(0)
    large = np.empty(_BLOCK, np.uint8)
    eights = large.view(np.uint64)
    for start in range(0, len(patterns), _BLOCK):
        block = patterns[start : start + _BLOCK]
        number = np.int32(0)
        for i in range(len(block)):  # vector code, as nothing is collected yet
            is_large = np.uint8((block[i] & _MAGNITUDE) >= bound)
            large[i] = is_large
            number += is_large
        if found + np.uint64(number) >= np.uint64(len(indices)):
            return -1
        # No branch for an element: every index is written, and overwritten by the next one if it is of a small one.
        if number < _FEW and len(block) == _BLOCK:
            for eight in range(_BLOCK // 8):
                if eights[eight] != 0:
                    for i in range(8 * eight, 8 * eight + 8):
                        indices[found] = np.uint32(start + i)
                        found += np.uint64(large[i])
        else:
            for i in range(len(block)):
                indices[found] = np.uint32(start + i)
                found += np.uint64(large[i])
        for i in range(found - np.uint64(number), found):  # while they are in the cache
            collected[i] = patterns[indices[i]]
    return np.int64(found)


@jit(types.void(_PATTERNS, types.int32, types.uint32[::1]), cache=True)
def _collect_ties(patterns: Any, kth: Any, indices: Any) -> None:
    """The indices of all magnitudes > kth and of the first ones == kth: len(indices) - 1 in all, which must exist."""
    larger = 0
    for i in range(len(patterns)):
        larger += (patterns[i] & _MAGNITUDE) > kth
    ties = len(indices) - 1 - larger
    found = np.uint64(0)
    for i in range(len(patterns)):
        magnitude = patterns[i] & _MAGNITUDE
        tie = magnitude == kth
        indices[found] = np.uint32(i)
        found += np.uint64((magnitude > kth) | (tie & (ties > 0)))
        ties -= tie
