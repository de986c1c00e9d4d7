"""Small codecs whose result can be computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from ring import Codec, Hop, Region
from ring.codec import Array, Payload


class PairSums(Codec):
    """Linear: of each two neighbours only their sum travels; both decode to half of it. An odd last one is kept."""

    linear = True

    def describe(self, dtype: np.dtype[Any]) -> str:
        return "sums of pairs"

    def regions(self, length: int, dtype: np.dtype[Any]) -> list[Region]:
        return [Region(length, 2, dtype.itemsize, dtype.itemsize)]

    def encode(self, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        sums = payload.view(values.dtype)
        sums[:] = values[::2]
        sums[: len(values) // 2] += values[1::2]

    def reduce(self, incoming: Payload, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        payload.view(values.dtype)[:] += incoming.view(values.dtype)

    def decode(self, payload: Payload, start: int, values: Array, size: int) -> None:
        sums = payload.view(values.dtype)
        values[::2] = sums
        values[: 2 * (len(values) // 2) : 2] /= 2
        values[1::2] = sums[: len(values) // 2] / 2


class HalfPerHop(Codec):
    """Per-hop: float32 values travel as float16, rounded anew at every hop, with the hop's step added to each."""

    linear = False

    def describe(self, dtype: np.dtype[Any]) -> str:
        return "half per hop"

    def regions(self, length: int, dtype: np.dtype[Any]) -> list[Region]:
        return [Region(length, 1, 2)]

    def encode(self, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        payload.view(np.float16)[:] = values + hop.step

    def reduce(self, incoming: Payload, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        payload.view(np.float16)[:] = incoming.view(np.float16).astype(values.dtype) + values + hop.step

    def decode(self, payload: Payload, start: int, values: Array, size: int) -> None:
        values[:] = payload.view(np.float16)
