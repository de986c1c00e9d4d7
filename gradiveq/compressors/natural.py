"""Natural compression: magnitudes become powers of two, one of the two nearest at random.

Horváth et al. 2019, Eq. 2 (C_nat): for 2^a <= |t| < 2^(a+1), |C(t)| is 2^(a+1) with probability |t|/2^a - 1 and 2^a
otherwise, so that E[C(t)] = t. In a float32's bits that is: add a random number below 2^23, then cut the 23 bits of the
mantissa off; the probability is exact. What is left is a sign and 8 bits of exponent, 9 bits an element: on the wire n
bytes of exponents, then ⌈n/8⌉ of signs.

**The ends of float32.** A denormal becomes 0 or the smallest normal number, 2^-126: unbiased, but without the relative
bound. From 2^127 on, where the power above is infinite, it is 2^127: biased. Infinities stay, NaNs become infinite.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import types
from torch import Tensor

from gradiveq.arrays.counter_random import random24, stream_key
from gradiveq.arrays.float32 import INFINITY_BITS
from gradiveq.arrays.jit import BYTES, FLOATS, jit
from gradiveq.arrays.signs import pack_signs, unpack_signs
from gradiveq.compressors.base import Array, Compressor, Constants, Draw, Float32
from gradiveq.device import bits


@jit(types.void(FLOATS, types.uint64, types.uint8[::1]), cache=True)
def _exponents(values: Float32, key: np.uint64, exponents: Array) -> None:
    low, high = np.uint32(key), np.uint32(key >> np.uint64(32))
    patterns = values.view(np.int32)
    for i in range(len(patterns)):
        magnitude = np.int32(patterns[i] & np.int32(0x7FFFFFFF))
        random23 = random24(np.uint32(i), low, high) >> np.int32(1)
        exponent = min(np.int32(np.int32(magnitude + np.int32(random23)) >> np.int32(23)), np.int32(254))
        exponents[i] = np.uint8(255) if magnitude >= INFINITY_BITS else np.uint8(exponent)


@jit(types.void(BYTES, types.float32[::1]), cache=True)
def _put_exponents(exponents: Array, out: Float32) -> None:
    """Exponents into numbers that have only their signs yet."""
    words = out.view(np.uint32)
    for i in range(len(words)):
        words[i] |= np.uint32(np.uint32(exponents[i]) << np.uint32(23))


@dataclass(frozen=True)
class Natural(Compressor):
    """A power of two for each element; unbiased, with an Ω of 1/8 whatever the length."""

    name = "natural"
    collective = "all_gather"
    biased = False

    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        payload = np.empty(self.payload_bytes(len(values)), np.uint8)
        _exponents(values, stream_key(*map(np.uint64, draw)), payload[: len(values)])
        payload[len(values) :] = pack_signs(values)
        return payload

    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        if len(payload) != self.payload_bytes(len(out)):
            raise ValueError(f"{len(out)} elements take {self.payload_bytes(len(out))} bytes, got {len(payload)}")
        unpack_signs(payload[len(out) :], np.float32(0), out)
        _put_exponents(payload[: len(out)], out)

    def payload_bytes(self, length: int) -> int:
        return length + -(-length // 8)

    def constants(self, length: int) -> Constants:
        """Theorem 1 of Horváth et al.: E‖C(x)‖² <= 9/8‖x‖². Of the normal numbers up to 2^127."""
        return Constants(omega=1 / 8, delta=7 / 8, variance=1 / 8)

    def compress_tensor(self, values: Tensor, draw: Draw) -> Tensor:
        magnitudes = values.view(torch.int32) & 0x7FFFFFFF
        powers = (magnitudes + (bits.random24(draw, len(values), values.device) >> 1)) >> 23
        exponents = torch.where(magnitudes >= INFINITY_BITS, 255, powers.clamp(max=254)).to(torch.uint8)
        return torch.cat([exponents, bits.pack_bits(values < 0)])

    def estimates(self, payloads: Tensor, length: int) -> Tensor:
        magnitudes = (payloads[..., :length].int() << 23).view(torch.float32)
        return torch.where(bits.unpack_bits(payloads[..., length:], length), -magnitudes, magnitudes)
