"""Half precision: float16 or bfloat16, rounded to the nearest (even), and summed in that type.

    dtype       bits of precision   smallest normal number   largest number
    float16     11                  6.1e-5                   65,504
    bfloat16    8                   1.2e-38, as float32      3.4e38

**Overflow.** Magnitudes are cut so that the sum of `workers` of them fits with the rounding of each addition: float16
with 64 workers at 992, bfloat16 at 4e36. Error feedback keeps what was cut. **Underflow.** Below 6.1e-5 float16 loses
precision gradually; below 3.0e-8 elements become 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import torch
from numba import types
from torch import Tensor

from gradiveq.arrays.float32 import INFINITY_BITS
from gradiveq.arrays.jit import FLOATS, jit
from gradiveq.compressors.base import Array, Compressor, Constants, Draw, Float32

HalfType = Literal["float16", "bfloat16"]
_DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_HALVES = types.Array(types.uint16, 1, "C", readonly=True)


@jit(types.void(FLOATS, types.float32, types.uint16[::1]), cache=True)
def _to_float16(values: Float32, limit: np.float32, out: Array) -> None:
    """Cut and round to the nearest, to the even one of two, on the bits of a float32.

    Normal numbers: half a unit is added, then 13 bits of the mantissa go. Smaller ones are multiples of 2^-24, to which
    the addition of 1/2 rounds. NaNs stay.
    """
    constants = np.empty(2, np.float32)
    constants[0], constants[1] = limit, 0.5
    most, half = constants.view(np.int32)
    moved = np.empty(1024, np.float32)
    for first in range(0, len(values), len(moved)):
        part, target = values[first : first + len(moved)], out[first : first + len(moved)]
        for i in range(len(part)):
            moved[i] = abs(part[i]) + np.float32(0.5)
        patterns, small = part.view(np.int32), moved.view(np.int32)
        for i in range(len(part)):
            magnitude = np.int32(patterns[i] & np.int32(0x7FFFFFFF))
            cut = min(magnitude, most)
            odd = np.int32(cut >> np.int32(13)) & np.int32(1)
            normal = np.int32(cut - np.int32((112 << 23) - 0xFFF) + odd) >> np.int32(13)
            rounded = normal if cut >= np.int32(113 << 23) else np.int32(small[i] - half)
            sign = np.int32(patterns[i] >> np.int32(16)) & np.int32(0x8000)
            target[i] = np.uint16((np.int32(0x7E00) if magnitude > np.int32(INFINITY_BITS) else rounded) | sign)


@jit(types.void(_HALVES, types.float32[::1]), cache=True)
def _from_float16(payload: Array, out: Float32) -> None:
    """Exact. Denormals come out right as the exponent's offset, 2^112, is multiplied with."""
    words = out.view(np.uint32)
    for i in range(len(payload)):
        magnitude = np.uint32(np.uint32(payload[i]) & np.uint32(0x7FFF))
        words[i] = np.uint32(magnitude << np.uint32(13))
    for i in range(len(payload)):
        out[i] *= np.float32(2.0**112)
    for i in range(len(payload)):
        magnitude = np.uint32(np.uint32(payload[i]) & np.uint32(0x7FFF))
        infinite = np.uint32(INFINITY_BITS) if magnitude >= np.uint32(0x7C00) else np.uint32(0)
        words[i] |= np.uint32(infinite | np.uint32(np.uint32(np.uint32(payload[i]) >> np.uint32(15)) << np.uint32(31)))


@jit(types.void(FLOATS, types.float32, types.uint16[::1]), cache=True)
def _to_bfloat16(values: Float32, limit: np.float32, out: Array) -> None:
    """Cut and round to the nearest, to the even one of two: half a unit is added, then 16 bits go. NaNs stay."""
    constants = np.empty(1, np.float32)
    constants[0] = limit
    most = constants.view(np.int32)[0]
    patterns = values.view(np.int32)
    for i in range(len(patterns)):
        magnitude = np.int32(patterns[i] & np.int32(0x7FFFFFFF))
        cut = min(magnitude, most)
        odd = np.int32(cut >> np.int32(16)) & np.int32(1)
        rounded = np.int32(cut + np.int32(0x7FFF) + odd) >> np.int32(16)
        sign = np.int32(patterns[i] >> np.int32(16)) & np.int32(0x8000)
        out[i] = np.uint16((np.int32(0x7FC0) if magnitude > np.int32(INFINITY_BITS) else rounded) | sign)


@dataclass(frozen=True)
class Half(Compressor):
    """Two bytes an element, added as they are.

    Args:
        dtype: "float16" or "bfloat16".
        workers: the most whose sum can't overflow.
    Raises:
        ValueError: a value out of its range.
    """

    dtype: HalfType = "float16"
    workers: int = 64

    name = "half"
    collective = "all_reduce"
    biased = True

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if not 1 <= self.workers <= 1024:
            raise ValueError(f"`workers` must be in 1 ... 1024, so that some range is left, got {self.workers}")

    @property
    def limit(self) -> float:
        """The largest magnitude that isn't cut: workers·limit·(1 + u)^workers fits, u the unit roundoff."""
        info = ml_dtypes.finfo(_DTYPES[self.dtype])  # type: ignore[no-untyped-call]
        exact = float(info.max) / (self.workers * (1 + float(info.eps) / 2) ** self.workers)
        rounded = _DTYPES[self.dtype].type(exact)
        return float(rounded if float(rounded) <= exact else np.nextafter(rounded, _DTYPES[self.dtype].type(0)))

    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        out = np.empty(len(values), np.uint16)
        convert = _to_float16 if self.dtype == "float16" else _to_bfloat16
        convert(values, np.float32(self.limit), out)
        return out.view(_DTYPES[self.dtype])

    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        if size > self.workers:
            raise ValueError(
                f"`workers` must be at least {size}, the number of workers, for a sum that fits, got {self.workers}"
            )
        if payload.shape != out.shape or payload.dtype != _DTYPES[self.dtype]:
            raise ValueError(f"{len(out)} elements take as many of {self.dtype}, got {len(payload)} of {payload.dtype}")
        if self.dtype == "float16":
            _from_float16(payload.view(np.uint16), out)
        else:
            out[:] = payload

    def payload_bytes(self, length: int) -> int:
        return 2 * length

    def constants(self, length: int) -> Constants:
        """‖x - C(x)‖² <= ‖x‖² and ‖C(x)‖² <= 4‖x‖² hold always: no element is off by more than itself.

        bfloat16: elements that are neither denormal nor cut are off by at most u = 2^-8 of themselves, which is a
        variance of 2^-16 of vectors of such elements. float16 has 2^-11 for u, but of elements from 6.1e-5 on only,
        which gradients rarely keep to; so nothing better than 1 is claimed.
        """
        if self.dtype == "bfloat16":
            return Constants(omega=(1 + 2.0**-8) ** 2 - 1, delta=1 - 2.0**-16, variance=2.0**-16)
        return Constants(omega=3.0, variance=1.0)

    def compress_tensor(self, values: Tensor, draw: Draw) -> Tensor:
        return values.clamp(-self.limit, self.limit).to(getattr(torch, self.dtype))

    def decompress_tensor(self, payload: Tensor, out: Tensor, draw: Draw) -> None:
        out.copy_(payload)
