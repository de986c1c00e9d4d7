"""Random numbers that are a function of a key and an element's position, for loops compiled with Numba.

Nothing is drawn in sequence, so that nothing depends on how a vector is cut or in which order its parts are rounded,
and the same hash runs in every lane of a vector register. A stream is keyed by four numbers, which a codec or a
compressor chooses: (seed, call, rank, step of the ring) or (seed, call, rank, part).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types

from gradiveq.arrays.jit import jit


@jit()
def mix64(x: Any) -> Any:
    """The finaliser of SplitMix64: a bijection of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit(types.uint64(types.uint64, types.uint64, types.uint64, types.uint64), cache=True)
def stream_key(seed: np.uint64, call: np.uint64, rank: np.uint64, step: np.uint64) -> Any:
    """64-bit key of one encoding's random numbers."""
    key = mix64(seed + np.uint64(0x9E3779B97F4A7C15))
    return mix64(mix64(mix64(key + call) + rank) + step)


@jit()
def random24(index: np.uint32, low: np.uint32, high: np.uint32) -> Any:
    """24 random bits, as an int32, for element `index` of the stream with the key (low, high).

    Wellons's triple32 with a second key. (With two rounds, as in lowbias32, elements whose indices differ by 192 had a
    correlation of 0.002: too small to matter here, but visible.)
    """
    x = np.uint32(index ^ low)
    x = np.uint32((x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB))
    x = np.uint32((x ^ (x >> np.uint32(11))) + high)
    x = np.uint32(x * np.uint32(0xAC4C1B51))
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB))
    return np.int32((x ^ (x >> np.uint32(14))) >> np.uint32(8))


class Draw(NamedTuple):
    """What the random numbers of one compression are keyed by; the same key draws the same numbers everywhere.

    Attributes:
        seed: of the run.
        call: of the aggregation, counted from 0.
        rank: of the worker.
        part: which layer, or 0 for the entire model.
    """

    seed: int
    call: int
    rank: int
    part: int

    def generator(self, *, shared: bool = False) -> np.random.Generator:
        """A generator of its own for this key; with `shared` it is the same on all ranks.

        Philox, so a key costs no state and nothing depends on what was drawn before. Cost: about 10 µs.
        """
        rank = 0 if shared else self.rank + 1
        return np.random.Generator(np.random.Philox(key=[self.seed, self.call], counter=[0, 0, rank, self.part]))
