"""Half precision: float16 or bfloat16, rounded to the nearest (even), and summed in that type.

    dtype       bits of precision   smallest normal number   largest number
    float16     11                  6.1e-5                   65,504
    bfloat16    8                   1.2e-38, as float32      3.4e38

**Overflow.** Magnitudes are cut so that the sum of `workers` of them fits with the rounding of each addition: float16
with 64 workers at 991, bfloat16 at 4e36. Error feedback keeps what was cut. **Underflow.** Below 6.1e-5 float16 loses
precision gradually; below 3.0e-8 elements become 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from gradiveq.compressors.base import Array, Compressor, Constants, Draw, Float32

HalfType = Literal["float16", "bfloat16"]
_DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


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
        return float(rounded if rounded <= exact else np.nextafter(rounded, _DTYPES[self.dtype].type(0)))

    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        limit = np.float32(self.limit)
        return np.clip(values, -limit, limit).astype(_DTYPES[self.dtype])

    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        if size > self.workers:
            raise ValueError(
                f"`workers` must be at least {size}, the number of workers, for a sum that fits, got {self.workers}"
            )
        if payload.shape != out.shape:
            raise ValueError(f"{len(out)} elements take {len(out)} numbers, got {len(payload)}")
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
