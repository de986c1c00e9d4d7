"""TernGrad: signs that are sent with a probability, of the size of the largest magnitude.

Wen et al. 2017, Eq. 1 and 2: with s = max|g|, each element becomes s·sign(g_i)·b_i, b_i ~ Bernoulli(|g_i|/s), so that
the mean is g. Their gradient clipping (Eq. 9) first cuts magnitudes at c·σ, c = 2.5 and σ the standard deviation of
the layer's gradient: s is then smaller, but elements beyond the cut are biased. A vector of equal elements, for which
c·σ is 0, isn't clipped.

On the wire: s (float32), then five trits a byte, as 3^5 = 243: 1.6 bits an element. With W = ⌈n/5⌉ bytes, byte j holds
the elements j, W + j, 2W + j, ... as digits 0, 1, 2 (for -s, 0, s) from the lowest upwards, so that packing is the same
product for a whole vector register.

**Rounding.** The probability has 24 bits, rounded down: the bias is below s·2^-23, and zeros stay zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
import torch.nn.functional as F
from numba import types
from torch import Tensor

from gradiveq.arrays.counter_random import random24, stream_key
from gradiveq.arrays.jit import BYTES, FLOATS, jit
from gradiveq.arrays.reductions import largest, standard_deviation
from gradiveq.compressors.base import Array, Compressor, Constants, Draw, Float32
from gradiveq.device import bits

TRITS = 5
#: ⌊byte / 3^k⌋ is (byte · _INVERSES[k]) >> 16 for every byte up to 242.
_INVERSES = tuple(-(-65536 // 3**k) for k in range(TRITS + 1))


@jit(types.void(FLOATS, types.float32, types.uint64, types.uint8[::1]), cache=True)
def _ternarise(values: Float32, scale: np.float32, key: np.uint64, trits: Array) -> None:
    low, high = np.uint32(key), np.uint32(key >> np.uint64(32))
    stride = len(trits)
    for j in range(stride):
        trits[j] = 0
    weight = 1
    for field in range(TRITS):
        first = field * stride
        part = values[first : first + stride]
        for i in range(len(part)):
            fixed_point = np.int32(min(abs(part[i]), scale) / scale * np.float32(1 << 24))
            sent = np.int32(fixed_point + random24(np.uint32(first + i), low, high)) >> np.int32(24)
            digit = np.int32(1 - sent) if part[i] < 0 else np.int32(1 + sent)
            trits[i] += np.uint8(digit * np.int32(weight))
        weight *= 3


@jit(types.void(BYTES, types.float32, types.float32[::1]), cache=True)
def _estimate(trits: Array, scale: np.float32, out: Float32) -> None:
    stride = len(trits)
    for field in range(TRITS):
        part = out[field * stride : (field + 1) * stride]
        inverse, next_inverse = np.uint32(_INVERSES[field]), np.uint32(_INVERSES[field + 1])
        for i in range(len(part)):
            byte = np.uint32(trits[i])
            digit = np.int32((byte * inverse) >> np.uint32(16)) - np.int32(3) * np.int32(
                (byte * next_inverse) >> np.uint32(16)
            )
            part[i] = np.float32(np.int32(digit - np.int32(1))) * scale


@dataclass(frozen=True)
class TernGrad(Compressor):
    """Three levels of the largest magnitude; unbiased without clipping.

    Args:
        clip: c, so that magnitudes are cut at c·σ; its paper has 2.5. None for no clipping, as in the figures of Dutta
            et al. 2020.
    Raises:
        ValueError: a value out of its range.
    """

    clip: float | None = None

    name = "terngrad"
    collective = "all_gather"
    biased = False

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"`clip` must be positive, in standard deviations, got {self.clip}")
        object.__setattr__(self, "biased", self.clip is not None)  # on the class it says what the default is

    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        payload = np.empty(self.payload_bytes(len(values)), np.uint8)
        if len(values):
            scale = self._scale(values)
            payload[:4] = np.array([scale]).view(np.uint8)
            # Zeros have the same trits with any other scale.
            _ternarise(values, scale or np.float32(1), stream_key(*map(np.uint64, draw)), payload[4:])
        return payload

    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        if len(payload) != self.payload_bytes(len(out)):
            raise ValueError(f"{len(out)} elements take {self.payload_bytes(len(out))} bytes, got {len(payload)}")
        if len(out):
            _estimate(payload[4:], payload[:4].copy().view(np.float32)[0], out)

    def payload_bytes(self, length: int) -> int:
        return 4 + -(-length // TRITS) if length else 0

    def constants(self, length: int) -> Constants:
        """Without clipping Ω = (√n - 1)/2.

        E‖Q(x)‖² = max|x|·‖x‖₁, which relative to ‖x‖² is largest, (1 + √n)/2, if all elements but one are equal to the
        largest over 1 + √n: the Ω of QSGD with one level and the largest magnitude as norm. Clipping cuts x to z with
        ‖x - z‖² + ‖z‖² <= ‖x‖²; so Ω stays, and the error is at most ‖x - z‖² + Ω‖z‖² <= max(1, Ω)‖x‖².
        """
        omega = (sqrt(max(1, length)) - 1) / 2
        variance = omega if self.clip is None else max(1.0, omega)
        return Constants(omega=omega, delta=1 - variance if variance < 1 else None, variance=variance)

    def _scale(self, values: Float32) -> np.float32:
        scale = np.float32(largest(values))
        if self.clip is not None:
            cut = np.float32(min(self.clip * standard_deviation(values), float(scale)))
            if cut > 0:
                return cut
        return scale

    def compress_tensor(self, values: Tensor, draw: Draw) -> Tensor:
        """The scale of a clipped vector may be the float32 beside the host's, as its sums are in the device's order.

        That holds while the vector's first element is within 2^13/√n standard deviations of the mean and n < 2^26.
        """
        length = len(values)
        if not length:
            return values.new_empty(0, dtype=torch.uint8)
        magnitudes = values.abs()
        scale = magnitudes.amax()
        if self.clip is not None:
            cut = torch.minimum(self.clip * _deviation_tensor(values), scale.double()).float()
            scale = torch.where(cut > 0, cut, scale)
        divisor = torch.where(scale == 0, 1, scale)
        probability = (torch.minimum(magnitudes, divisor) / divisor * (1 << 24)).int()
        sent = (probability + bits.random24(draw, length, values.device)) >> 24
        digits = torch.where(values < 0, 1 - sent, 1 + sent).to(torch.uint8)
        fields = F.pad(digits, (0, -length % TRITS)).view(TRITS, -1)
        trits = fields[0].clone()
        for field in range(1, TRITS):
            trits += fields[field] * 3**field
        return torch.cat([bits.as_bytes(scale), trits])

    def estimates(self, payloads: Tensor, length: int) -> Tensor:
        if not length:
            return payloads.float()
        weights = 3 ** torch.arange(TRITS, dtype=torch.int32, device=payloads.device).view(-1, 1)
        digits = payloads[..., None, 4:].int().div(weights, rounding_mode="floor") % 3
        return (digits.flatten(-2)[..., :length] - 1).float() * bits.cast(payloads[..., :4], torch.float32)


def _deviation_tensor(values: Tensor) -> Tensor:
    """`reductions.standard_deviation`, float64; exactly 0 of a constant vector too."""
    differences = values.double() - values[0].double()
    mean = differences.sum() / len(values)
    return (differences.square().sum() / len(values) - mean * mean).clamp(min=0).sqrt()
