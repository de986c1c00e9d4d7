"""Cuts of a vector: segments (one per worker) of chunks (one per message).

Everything here is arithmetic on (length, size, chunk size, codec), so that every rank and every driver cuts alike.
Cuts balance the bytes on the wire, not the elements: where a codec compresses parts of the vector by different
ratios, equal cuts of the vector would leave one payload several times as long as the mean.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

#: Most elements in a chunk of what is compressed, about: nothing hides the encoding of the first chunk and the decoding
#: of the last, and with one chunk in a segment nothing else is hidden either.
CHUNK_ELEMENTS = 256 * 1024


@dataclass(frozen=True)
class Region:
    """A stretch of the vector that is cut only between units.

    Attributes:
        length: elements in the region.
        unit: elements that stay together (1 for the identity, K for slices, the bucket for QSGD).
        unit_bytes: bytes of a full unit on the wire.
        tail_bytes: bytes of the last unit where `unit` does not divide `length`; otherwise unused.
    """

    length: int
    unit: int
    unit_bytes: int
    tail_bytes: int = 0

    def __post_init__(self) -> None:
        if self.length < 0 or self.unit < 1 or self.unit_bytes < 0 or self.tail_bytes < 0:
            raise ValueError(f"a region needs length >= 0, unit >= 1 and bytes >= 0, got {self}")

    @property
    def num_bytes(self) -> int:
        full, rest = divmod(self.length, self.unit)
        return full * self.unit_bytes + (self.tail_bytes if rest else 0)


class Chunk(NamedTuple):
    """One message: elements [start, stop) of the vector, bytes [first_byte, last_byte) of the whole payload."""

    start: int
    stop: int
    first_byte: int
    last_byte: int

    @property
    def num_bytes(self) -> int:
        return self.last_byte - self.first_byte


class PayloadMap:
    """Translation between elements of the vector and bytes of its payload."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = tuple(region for region in regions if region.length)
        self._elements = (0, *accumulate(region.length for region in self._regions))
        self._bytes = (0, *accumulate(region.num_bytes for region in self._regions))
        self.length = self._elements[-1]
        self.num_bytes = self._bytes[-1]

    def byte_at(self, element: int) -> int:
        """Bytes of the payload before `element`, at which it must be allowed to cut the vector."""
        if element == self.length:
            return self.num_bytes
        index = bisect_right(self._elements, element) - 1
        units, rest = divmod(element - self._elements[index], self._regions[index].unit)
        assert not rest, f"no cut at element {element} in {self._regions[index]}"
        return self._bytes[index] + units * self._regions[index].unit_bytes

    def cut_near(self, byte: int) -> int:
        """The element at which a cut comes closest to `byte`."""
        if byte <= 0:
            return 0
        if byte >= self.num_bytes:
            return self.length
        index = bisect_right(self._bytes, byte) - 1
        region, offset = self._regions[index], self._elements[index]
        full = region.length // region.unit
        units = min((byte - self._bytes[index]) // region.unit_bytes, full) if region.unit_bytes else full
        before = offset + units * region.unit
        after = min(before + region.unit, self._elements[index + 1])
        return before if byte - self.byte_at(before) <= self.byte_at(after) - byte else after

    def cut(self, start: int, stop: int, parts: int) -> list[int]:
        """`parts` + 1 ascending elements from `start` to `stop` that split the bytes between them most evenly."""
        first, last = self.byte_at(start), self.byte_at(stop)
        inner = (self.cut_near(first + (last - first) * part // parts) for part in range(1, parts))
        return [start, *(min(max(cut, start), stop) for cut in inner), stop]


def check_chunk_bytes(chunk_bytes: int) -> None:
    """Check that `chunk_bytes` is a whole number of at least 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(f"`chunk_bytes` must be a whole number of at least 1, got {chunk_bytes!r}")


def cut_segments(
    regions: Sequence[Region], size: int, chunk_bytes: int, bounds: Sequence[int] | None = None
) -> list[list[Chunk]]:
    """The chunks of each of the `size` segments; a segment may be empty.

    Args:
        regions: the regions of the vector, as the codec says.
        size: number of workers.
        chunk_bytes: the most bytes of payload in a chunk, to within a unit. Of what takes less than two bytes an
            element, a chunk also has no more than about CHUNK_ELEMENTS, or chunk_bytes / 2 elements if these are more.
        bounds: size + 1 ascending elements at which the segments are cut; by default their payloads are equal.
    """
    payload = PayloadMap(regions)
    if bounds is None:
        bounds = payload.cut(0, payload.length, size)
    elif len(bounds) != size + 1 or bounds[0] != 0 or bounds[-1] != payload.length or sorted(bounds) != list(bounds):
        raise ValueError(f"`bounds` must ascend from 0 to {payload.length} in {size + 1} numbers, got {list(bounds)}")
    return [_cut_chunks(payload, start, stop, chunk_bytes) for start, stop in pairwise(bounds)]


def cut_segment(payload: PayloadMap, index: int, size: int, chunk_bytes: int) -> list[Chunk]:
    """The chunks of one of the segments that `cut_segments` makes, without the others."""
    start, stop = (payload.cut_near(payload.num_bytes * part // size) for part in (index, index + 1))
    return _cut_chunks(payload, start, stop, chunk_bytes)


def _cut_chunks(payload: PayloadMap, start: int, stop: int, chunk_bytes: int) -> list[Chunk]:
    num_bytes = payload.byte_at(stop) - payload.byte_at(start)
    most_elements = max(CHUNK_ELEMENTS, chunk_bytes // 2)
    cuts = payload.cut(start, stop, max(1, -(-num_bytes // chunk_bytes), -(-(stop - start) // most_elements)))
    return [
        Chunk(first, last, payload.byte_at(first), payload.byte_at(last))
        for first, last in pairwise(cuts)
        if first < last
    ]
