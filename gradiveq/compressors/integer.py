"""Scaled integer rounding: fixed-point numbers that a network switch, or a ring, can add.

SwitchML (Sapio et al. 2019, section 3.7): every worker sends round(scale·x) as an integer, the sum over the workers is
an integer sum, exact and the same in any order, and decodes to sum/scale. The error of an element is at most ε = 1/2 of
a step of 1/scale, or one step with stochastic rounding, whatever x is: an absolute compressor (section 5 of Sahu et al.
2021), with υ² = dε² for d elements.

**Range.** The sum of `workers` numbers must fit, so each is cut at ⌊(2^(bits-1) - 1)/workers⌋ steps. Beyond this range,
`limit` in units of x, neither the absolute bound nor unbiasedness holds; error feedback keeps what was cut. As to size:
32 bits save no bytes (they are what a switch can add), 16 and 8 do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numba import types
from torch import Tensor

from gradiveq.arrays.counter_random import random24, stream_key
from gradiveq.arrays.jit import FLOATS, jit
from gradiveq.compressors.base import Array, Compressor, Constants, Draw, Float32
from gradiveq.device import bits

Rounding = Literal["nearest", "stochastic"]
_DTYPES = {8: np.int8, 16: np.int16, 32: np.int32}


_NUMBA_TYPES = (types.int8, types.int16, types.int32)


@jit(
    [
        types.void(FLOATS, types.float64, types.float64, types.boolean, types.uint64, integer[::1])
        for integer in _NUMBA_TYPES
    ],
    cache=True,
)
def _round(values: Float32, scale: float, most: float, stochastic: bool, key: np.uint64, out: Array) -> None:
    """⌊scale·x + u⌋ with u = 1/2, or uniform; in float64, so that 32 bits are exact."""
    low, high = np.uint32(key), np.uint32(key >> np.uint64(32))
    if stochastic:
        for i in range(len(values)):
            u = np.float64(random24(np.uint32(i), low, high)) * 2.0**-24
            y = np.floor(np.float64(values[i]) * scale + u)
            out[i] = np.int32(min(max(y, -most), most))
    else:
        for i in range(len(values)):
            y = np.floor(np.float64(values[i]) * scale + 0.5)
            out[i] = np.int32(min(max(y, -most), most))


@jit(
    [
        types.void(types.Array(integer, 1, "C", readonly=True), types.float64, types.float32[::1])
        for integer in _NUMBA_TYPES
    ],
    cache=True,
)
def _estimate(payload: Array, scale: float, out: Float32) -> None:
    for i in range(len(payload)):
        out[i] = np.float32(np.float64(payload[i]) / scale)


@dataclass(frozen=True)
class Integer(Compressor):
    """Whole multiples of 1/scale, added as integers.

    Args:
        scale: steps in 1 unit of the gradient.
        bits: 8, 16 or 32, of the integers that are sent and added.
        rounding: "nearest", or "stochastic" for an unbiased estimate.
        workers: the most whose sum fits.
    Raises:
        ValueError: a value out of its range.
    """

    scale: float = 2.0**20
    bits: int = 32
    rounding: Rounding = "nearest"
    workers: int = 64

    name = "integer"
    collective = "all_reduce"
    biased = True

    def __post_init__(self) -> None:
        if not 0 < self.scale < np.inf:
            raise ValueError(f"`scale` must be positive and finite, got {self.scale}")
        if self.bits not in _DTYPES:
            raise ValueError(f"`bits` must be one of {', '.join(map(str, _DTYPES))}, got {self.bits}")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"`rounding` must be 'nearest' or 'stochastic', got {self.rounding!r}")
        most = (1 << (self.bits - 1)) - 1
        if not 1 <= self.workers <= most:
            raise ValueError(f"`workers` must be in 1 ... {most}, for a sum in {self.bits} bits, got {self.workers}")
        # On the class it says what the default is.
        object.__setattr__(self, "biased", self.rounding == "nearest")

    @property
    def limit(self) -> float:
        """The largest magnitude that isn't cut, in units of the gradient."""
        return self.most / self.scale

    @property
    def most(self) -> int:
        """The largest number that is sent."""
        return ((1 << (self.bits - 1)) - 1) // self.workers

    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        out = np.empty(len(values), _DTYPES[self.bits])
        key = stream_key(*map(np.uint64, draw))
        _round(values, self.scale, float(self.most), self.rounding == "stochastic", key, out)
        return out

    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        if size > self.workers:
            raise ValueError(
                f"`workers` must be at least {size}, the number of workers, for a sum that fits, got {self.workers}"
            )
        if payload.shape != out.shape or payload.dtype != _DTYPES[self.bits]:
            raise ValueError(
                f"{len(out)} elements take as many {self.bits}-bit integers, got {len(payload)} of {payload.dtype}"
            )
        _estimate(payload, self.scale, out)

    def payload_bytes(self, length: int) -> int:
        return length * self.bits // 8

    def constants(self, length: int) -> Constants:
        """υ² = d/(4·scale²), of vectors within `limit`; with float32's rounding to be added.

        To the nearest, each error is at most half a step, and also at most |x|: so ‖x - C(x)‖² <= ‖x‖² and
        ‖C(x)‖² <= 4‖x‖², beyond the limit too. Stochastically it has the variance f(1 - f) <= 1/4 steps², f the
        fraction; near zero that is far more than x², so there is no relative bound.
        """
        absolute = length / (4 * self.scale**2)
        if self.rounding == "stochastic":
            return Constants(absolute=absolute)
        return Constants(omega=3.0, variance=1.0, absolute=absolute)

    def compress_tensor(self, values: Tensor, draw: Draw) -> Tensor:
        """Float64 throughout, without which 32 bits can't be the host's."""
        u: Tensor | float = 0.5
        if self.rounding == "stochastic":
            u = bits.random24(draw, len(values), values.device).double() * 2.0**-24
        # Two operations: with one, a GPU wouldn't round the product.
        steps = (values.double() * self.scale + u).floor_()
        return steps.clamp_(-self.most, self.most).to(getattr(torch, f"int{self.bits}"))

    def decompress_tensor(self, payload: Tensor, out: Tensor, draw: Draw) -> None:
        exact = payload.double()
        out.copy_(exact / bits.constant(self.scale, exact))
