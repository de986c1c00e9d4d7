"""One bit an element: vectors of -1 and 1."""

from __future__ import annotations

import numpy as np
from numba import types

from gradiveq.arrays.float32 import Array, Float32
from gradiveq.arrays.jit import BYTES, jit


def pack_signs(values: Float32) -> Array:
    """Bit i % 8 of byte i // 8 is 1 where element i is below zero; zeros of both signs count as positive.

    Returns:
        uint8 of shape (ceil(n/8),).
    """
    return np.packbits(values < 0, bitorder="little")


@jit(types.void(BYTES, types.float32, types.float32[::1]), cache=True)
def unpack_signs(signs: Array, magnitude: np.float32, out: Float32) -> None:
    """out = ±magnitude.

    Args:
        signs: as `pack_signs` returns it; its length isn't checked.
        magnitude: at least 0.
    """
    words = out.view(np.uint32)
    constant = np.empty(1, np.float32)
    constant[0] = magnitude
    pattern = constant.view(np.uint32)[0]
    whole = len(out) // 8
    for j in range(whole):
        byte = np.uint32(signs[j])
        for bit in range(8):
            words[8 * j + bit] = pattern | np.uint32(np.uint32(byte << np.uint32(31 - bit)) & np.uint32(0x80000000))
    for i in range(8 * whole, len(out)):
        byte = np.uint32(signs[i >> 3])
        words[i] = pattern | np.uint32(np.uint32(byte << np.uint32(31 - (i & 7))) & np.uint32(0x80000000))
