"""QSGD in the ring, quantised on a device. The ring passes payloads on in host memory, where copies of them are.

    device    gradient --> encode              decode, add, encode                  decode --> mean
                             | copy              ^ copy      | copy                   ^ copy
    host                     v                   |           v                        |
              ring:        send               receive      send                    receive

What is copied at a hop is the payload, an eighth of the gradient with 4 bits, there and back. The gradient itself stays
on the device, and no float of it crosses the bus. All ranks decode the same payload, so replicas stay the same bits;
they are the host's bits too (`gradiveq.over_ring.qsgd_triton`), so ranks with and without a GPU may share a ring.

**When it pays.** On one core of the host a hop takes 1.25 ns an element (800 M elements/s, `bench.qsgd_throughput`).
Copies take 1.02 bytes an element: 0.07 ns over PCIe 3.0 x16 (8 GT/s in 16 lanes of 128b/130b: 15.75 GB/s). The kernel
reads and writes 5 bytes an element (0.006 ns at 900 GB/s). Beside that a chunk takes two copies, a launch and a wait;
at 10 µs each, which is assumed and not measured, the host is ahead in chunks below some 32,000 elements.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradiveq.over_ring import qsgd_triton
from gradiveq.over_ring.qsgd import QSGD
from gradiveq.over_ring.staging import Mirror, OnDevice
from ring.codec import Array, Composite, Hop, IdentityCodec, Payload
from ring.handle import Ring
from ring.plan import Stats
from ring.segments import Region
from ring.timeline import Timeline

#: Elements of a chunk from which the device is ahead of the host (the module's docstring).
FROM_ELEMENTS = 32_768


def pays(codec: QSGD, elements: int, device: torch.device) -> bool:
    """Whether chunks of so many elements are better quantised on the device, if that is possible at all."""
    possible = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return possible and elements >= FROM_ELEMENTS and codec.bucket <= qsgd_triton.MOST_OF_A_BUCKET


@dataclass(frozen=True, eq=False)
class StagedQSGD(OnDevice):
    """The mean over the workers of the gradient in a mirror.

    Args:
        codec: whose payload travels; another one in each iteration (`dataclasses.replace`).
        mirror: the gradient is in the first elements of its `values`. Of its host memory only what is behind them is
            used.
        length: of the gradient.
        pinned, words: int32, payload of the whole gradient on the host and on the device. A chunk has its own place, so
            nothing that is still copied or decoded is overwritten.
    """

    codec: QSGD
    mirror: Mirror
    length: int
    pinned: Tensor
    words: Tensor

    linear = False

    @classmethod
    def of(cls, codec: QSGD, mirror: Mirror, length: int) -> StagedQSGD:
        words = sum(region.num_bytes for region in codec.regions(length, np.dtype(np.float32))) // 4
        pinned = mirror.lane.host_memory(words).view(torch.int32)
        return cls(codec, mirror, length, pinned, torch.empty(words, dtype=torch.int32, device=mirror.device))

    @property
    def num_bytes(self) -> int:
        return self.words.nbytes

    def mean_over(
        self, ring: Ring, controls: Sequence[float], chunk_bytes: int | None, timeline: Timeline
    ) -> tuple[Stats, list[float]]:
        vector = self.mirror.host[: self.length + len(controls)]
        vector[self.length :] = controls
        parts = Composite([(self.length, self), (len(controls), IdentityCodec())])
        stats = ring.all_reduce(vector, parts, chunk_bytes=chunk_bytes, timeline=timeline)
        with timeline.span("decode"):
            self.mirror.lane.settle()
        return stats, (vector[self.length :] / ring.size).tolist()

    def describe(self, dtype: np.dtype[Any]) -> str:
        return self.codec.describe(dtype)

    def regions(self, length: int, dtype: np.dtype[Any]) -> Sequence[Region]:
        return self.codec.regions(length, dtype)

    def amounts(self, kind: str, values: Array, start: int, payload: Payload) -> Sequence[tuple[str, float]]:
        """What the host would compute. A cluster is not told of copies."""
        return self.codec.amounts(kind, values, start, payload)

    def encode(self, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        self._recode(None, values, start, payload, hop)

    def reduce(self, incoming: Payload, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        self._recode(incoming, values, start, payload, hop)

    def decode(self, payload: Payload, start: int, values: Array, size: int) -> None:
        """The mean, on the device: `values` are left alone."""
        words = self._push(payload, start)
        mean = self.mirror.values[start : start + len(values)]
        qsgd_triton.decode(words, self.codec, mean, size)

    def _recode(self, incoming: Payload | None, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        place = self._place(payload, start)
        own = self.mirror.values[start : start + len(values)]
        words = self.words[place]
        arrived = None if incoming is None else self._push(incoming, start)
        qsgd_triton.recode(arrived, own, int(self.codec.key(hop)) + start, self.codec, words)
        self.mirror.lane.fetch(self.pinned[place], words).synchronize()
        payload.view(np.int32)[:] = self.pinned[place].numpy()

    def _push(self, payload: Payload, start: int) -> Tensor:
        """Begin to copy to the device."""
        place = self._place(payload, start)
        self.pinned[place].numpy()[:] = payload.view(np.int32)
        self.mirror.lane.push(self.words[place], self.pinned[place])
        self.mirror.lane.join()
        return self.words[place]

    def _place(self, payload: Payload, start: int) -> slice:
        """The words of a chunk, which begins with a bucket."""
        first = start // self.codec.bucket * (self.codec.num_bytes(self.codec.bucket) // 4)
        return slice(first, first + len(payload) // 4)
