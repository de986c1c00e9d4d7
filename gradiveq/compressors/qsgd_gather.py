"""QSGD as its paper sends it: every worker's levels to everybody. (In the ring, hop by hop: `gradiveq.over_ring.qsgd`.)

Alistarh et al. 2017, section 3.1: with m the norm of the vector, or of each bucket of it, and s levels beside the sign,

    Q(x)_i = m · sign(x_i) · ξ_i,    ξ_i = ⌊y⌋/s or (⌊y⌋ + 1)/s at random,  y = s|x_i|/m,  so that  E[Q(x)] = x.

On the wire: the norms (float32), then s ± level of each element in the ⌈log2(2s + 1)⌉ bits that this needs, without the
paper's Elias coding.

**Rounding.** The probability is y's fraction to 24 bits, of y in float32: the bias is below m·2^-22. A norm beyond
float32 is sent as the largest float32, which keeps it unbiased; with norm "max" the largest element is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numba import types
from torch import Tensor

from gradiveq.arrays.bits import UInt32, pack, packed_bytes, unpack
from gradiveq.arrays.counter_random import random24, stream_key
from gradiveq.arrays.float32 import LARGEST
from gradiveq.arrays.jit import FLOATS, WORDS, jit
from gradiveq.arrays.levels import Norm, level_variance
from gradiveq.arrays.reductions import largest, sum_of_squares
from gradiveq.compressors.base import Array, Compressor, Constants, Draw, Float32
from gradiveq.device import bits

_MOST_LEVELS = 2**16
#: Elements that are quantised and packed at a time: 1.4 times as fast as a vector of codes, as these stay in the cache.
#: Whole blocks of `pack`, so that stretches of packed codes join without gaps.
_STRETCH = 2**16


@jit(types.void(FLOATS, types.int64, types.boolean, types.float32[::1]), cache=True)
def _norms(values: Float32, bucket: int, l2: bool, norms: Float32) -> None:
    for index in range(len(norms)):
        part = values[index * bucket : (index + 1) * bucket]
        norms[index] = largest(part)
        if l2 and norms[index] < np.inf:  # also not NaN
            norms[index] = min(np.sqrt(sum_of_squares(part)), np.float64(LARGEST))


@jit(types.void(FLOATS, types.int64, FLOATS, types.int64, types.int64, types.uint64, types.uint32[::1]), cache=True)
def _quantise(
    values: Float32, start: int, norms: Float32, bucket: int, levels: int, key: np.uint64, codes: UInt32
) -> None:
    """The codes of a stretch that begins at element `start` of the vector."""
    low, high = np.uint32(key), np.uint32(key >> np.uint64(32))
    middle, top = np.int32(levels), np.float32(levels)
    first = 0
    while first < len(values):
        index = (start + first) // bucket
        last = min(len(values), (index + 1) * bucket - start)
        part, out, norm = values[first:last], codes[first:last], norms[index]
        if not 0 < norm < np.inf:
            for i in range(len(part)):
                out[i] = np.uint32(middle)
        else:
            for i in range(len(part)):
                y = abs(part[i]) / norm * top  # a true division: 1/norm could overflow
                whole = np.int32(y)
                fraction = np.int32((y - np.float32(whole)) * np.float32(1 << 24))
                carry = np.int32(fraction + random24(np.uint32(start + first + i), low, high)) >> np.int32(24)
                level = np.int32(whole + carry)
                out[i] = np.uint32(np.int32(middle - level) if part[i] < 0 else np.int32(middle + level))
        first = last


@jit(types.void(WORDS, types.int64, FLOATS, types.int64, types.int64, types.float32[::1]), cache=True)
def _estimate(codes: UInt32, start: int, norms: Float32, bucket: int, levels: int, out: Float32) -> None:
    """The inverse, of a stretch that begins at element `start`."""
    middle, top = np.int32(levels), np.float32(levels)
    first = 0
    while first < len(out):
        index = (start + first) // bucket
        last = min(len(out), (index + 1) * bucket - start)
        part, target, norm = codes[first:last], out[first:last], norms[index]
        for i in range(len(part)):
            target[i] = np.float32(np.int32(np.int32(part[i]) - middle)) / top * norm
        first = last


@dataclass(frozen=True)
class QSGDGather(Compressor):
    """Stochastic quantisation to s levels of a norm; unbiased.

    Args:
        levels: s, 1 ... 65,536. 2^b - 1 of them fill b + 1 bits; the layer-wise paper's 256 (Fig. 4) take 10.
        norm: "l2", or "max" for the largest magnitude.
        bucket: elements that share a norm; None for the whole vector.
    Raises:
        ValueError: a value out of its range.
    """

    levels: int = 256
    norm: Norm = "l2"
    bucket: int | None = None

    name = "qsgd-gather"
    collective = "all_gather"
    biased = False

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= _MOST_LEVELS:
            raise ValueError(f"`levels` must be in 1 ... {_MOST_LEVELS}, as float32 has 24 bits, got {self.levels}")
        if self.norm not in ("max", "l2"):
            raise ValueError(f"`norm` must be 'max' or 'l2', got {self.norm!r}")
        if self.bucket is not None and self.bucket < 1:
            raise ValueError(f"`bucket` must be at least 1, got {self.bucket}")

    @property
    def bits(self) -> int:
        """Bits of an element's code, which is a number in 0 ... 2s."""
        return (2 * self.levels).bit_length()

    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        length, bucket = len(values), self._bucket(len(values))
        payload = np.empty(self.payload_bytes(length), np.uint8)
        norms = np.empty(self._num_norms(length), np.float32)
        _norms(values, bucket, self.norm == "l2", norms)
        payload[: norms.nbytes] = norms.view(np.uint8)
        key = stream_key(*map(np.uint64, draw))
        codes = np.empty(min(length, _STRETCH), np.uint32)
        for start, wire in self._stretches(length, payload[norms.nbytes :]):
            part = values[start : start + _STRETCH]
            _quantise(part, start, norms, bucket, self.levels, key, codes)
            wire[:] = pack(codes[: len(part)], self.bits)
        return payload

    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        length, bucket = len(out), self._bucket(len(out))
        if len(payload) != self.payload_bytes(length):
            raise ValueError(f"{length} elements take {self.payload_bytes(length)} bytes, got {len(payload)}")
        header = 4 * self._num_norms(length)
        norms = payload[:header].copy().view(np.float32)
        for start, wire in self._stretches(length, payload[header:]):
            part = out[start : start + _STRETCH]
            _estimate(unpack(wire, self.bits, len(part)), start, norms, bucket, self.levels, part)

    def payload_bytes(self, length: int) -> int:
        return 4 * self._num_norms(length) + packed_bytes(length, self.bits)

    def constants(self, length: int) -> Constants:
        """Ω of `gradiveq.arrays.levels.level_variance`, the tight form of the paper's Lemma 3.1 (3.4 in later ones)."""
        variance = level_variance(self.levels, max(1, min(self._bucket(length), length)), self.norm)
        return Constants(omega=variance, delta=1 - variance if variance < 1 else None, variance=variance)

    def _bucket(self, length: int) -> int:
        return self.bucket or max(1, length)

    def _num_norms(self, length: int) -> int:
        return -(-length // self._bucket(length))

    def _stretches(self, length: int, wire: Array) -> Iterator[tuple[int, Array]]:
        """The first element of each stretch of the vector, and its codes on the wire."""
        stretch_bytes = packed_bytes(_STRETCH, self.bits)
        for index, start in enumerate(range(0, length, _STRETCH)):
            yield start, wire[index * stretch_bytes : (index + 1) * stretch_bytes]

    def compress_tensor(self, values: Tensor, draw: Draw) -> Tensor:
        """L2 norms may be the float32 beside the host's, and then codes may be one level off."""
        length, bucket = len(values), self._bucket(len(values))
        if not length:
            return values.new_empty(0, dtype=torch.uint8)
        rows = F.pad(values, (0, -length % bucket)).view(-1, bucket)
        magnitudes = rows.abs()
        most = magnitudes.amax(1)
        norms = most
        if self.norm == "l2":
            lengths = torch.linalg.vector_norm(rows, 2, 1, dtype=torch.float64)
            norms = torch.where(most.isfinite(), lengths.clamp(max=LARGEST).float(), most)
        usable = (norms.isfinite() & (norms > 0)).view(-1, 1)
        y = torch.where(usable, magnitudes / norms.view(-1, 1), 0) * self.levels
        whole = y.int()
        fractions = ((y - whole.float()) * (1 << 24)).int()
        random = bits.random24(draw, rows.numel(), values.device).view(rows.shape)
        levels = whole + ((fractions + random) >> 24)
        codes = self.levels + torch.where(rows < 0, -levels, levels)
        return torch.cat([norms.view(torch.uint8), bits.pack(codes.view(-1)[:length].long(), self.bits)])

    def estimates(self, payloads: Tensor, length: int) -> Tensor:
        header, bucket = payloads.shape[-1] - packed_bytes(length, self.bits), self.bucket or length
        levels = (bits.unpack(payloads[..., header:], self.bits, length) - self.levels).float()
        norms = bits.cast(payloads[..., :header], torch.float32).unsqueeze(-1)
        norms = norms.expand(*norms.shape[:-1], bucket).flatten(-2)[..., :length]
        return levels / bits.constant(self.levels, levels) * norms
