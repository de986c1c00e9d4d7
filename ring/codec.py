"""Codecs: the contract between the ring and a compressor, about what travels.

The ring never looks inside a vector. It asks a codec where the vector may be cut and how many bytes each piece
takes on the wire, and then lets the codec fill (`encode`), combine (`reduce`) and empty (`decode`) those bytes.

A codec is *linear* if payloads may be added as they are (GradiVeQ; the identity) and *per-hop* if each hop has to
decode, add and encode again (QSGD in the ring, Fig. 2a of Yu et al. 2018). That flag is all the algorithm needs: a
linear codec encodes its own contribution while the other one is still arriving, a per-hop codec can't.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ring.segments import PayloadMap, Region

Array = npt.NDArray[Any]
Payload = npt.NDArray[np.uint8]

#: NumPy has no bfloat16 of its own; an array with the dtype of the ml_dtypes package is accepted.
DTYPES = ("float16", "float32", "float64", "bfloat16")
#: Integers are added as they are, and have no mean; that their sum fits is the caller's business.
INTEGERS = ("int8", "int16", "int32")
#: Bytes may mean anything: they can be gathered, and not added.
BYTES = "uint8"


class Hop(NamedTuple):
    """Place in the ring at which an encoding happens; a codec keys its random numbers by it."""

    rank: int
    size: int
    step: int


class Codec(ABC):
    """Turns stretches of a vector into bytes and back.

    `values` is always a view of the vector from element `start` on, cut where `regions` allows; `payload` and
    `incoming` are uint8 views of exactly the bytes that `regions` declares for it.
    """

    #: True if payloads may be added as they are.
    linear: bool
    #: True if the payload *is* the vector's memory, so that nothing has to be encoded or decoded.
    in_place: bool = False
    #: True if the vector is filled from elsewhere while the ring runs, and wanted there again: then `encode` is called
    #: before a chunk is first used, and `decode` when it is finished, also of what is in place.
    staged: bool = False

    @abstractmethod
    def describe(self, dtype: np.dtype[Any]) -> str:
        """One short line that ranks compare before they use each other's bytes."""

    @abstractmethod
    def regions(self, length: int, dtype: np.dtype[Any]) -> Sequence[Region]:
        """The regions of a vector of `length`: where it may be cut, and the bytes of each piece.

        Raises:
            ValueError: the codec can't code such a vector.
        """

    @abstractmethod
    def encode(self, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        """Write this worker's own contribution into `payload`. `values` is not modified."""

    @abstractmethod
    def reduce(self, incoming: Payload, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        """Put the sum of `incoming` and of this worker's own contribution into `payload`.

        A linear codec finds its own contribution encoded in `payload` and adds; a per-hop codec decodes
        `incoming`, adds `values` and encodes. `incoming` is not modified: it may be the predecessor's own memory.
        """

    @abstractmethod
    def decode(self, payload: Payload, start: int, values: Array, size: int) -> None:
        """Write the sum over `size` workers into `values`. `payload` is not modified (it may still be on its way)."""

    def amounts(self, kind: str, values: Array, start: int, payload: Payload) -> Sequence[tuple[str, float]]:
        """Amounts that a call computes, by the names in a cluster's table of rates (`ring.cluster`).

        Args:
            kind: "encode", "add" (`reduce` of a linear codec), "recode" (of another), or "decode".
            values, start, payload: as for `encode`; neither is looked into.
        Returns:
            Pairs of a rate's name and an amount; by default "add" and the bytes of the payload, or the class's name
            with the kind, such as "qsgd.encode", and the number of elements.
        """
        return [("add", len(payload))] if kind == "add" else [(f"{type(self).__name__.lower()}.{kind}", len(values))]


class IdentityCodec(Codec):
    """No compression: plain ring all-reduce. The payload is the vector itself, nothing is copied.

    Cost per rank: one add per element and hop of the reduce-scatter.
    """

    linear = True
    in_place = True

    def describe(self, dtype: np.dtype[Any]) -> str:
        return "identity"

    def regions(self, length: int, dtype: np.dtype[Any]) -> Sequence[Region]:
        return (Region(length, 1, dtype.itemsize),)

    def encode(self, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        payload.view(values.dtype)[:] = values

    def reduce(self, incoming: Payload, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        own = payload.view(values.dtype)
        np.add(own, incoming.view(values.dtype), own)

    def decode(self, payload: Payload, start: int, values: Array, size: int) -> None:
        values[:] = payload.view(values.dtype)

    def amounts(self, kind: str, values: Array, start: int, payload: Payload) -> Sequence[tuple[str, float]]:
        names = {"add": ["add"], "recode": ["copy", "add"]}.get(kind, ["copy"])
        return [(name, len(payload)) for name in names]


class _Piece(NamedTuple):
    """The share of one part in a chunk: elements of the chunk, where they start in the part, bytes of the payload."""

    codec: Codec
    elements: slice
    start: int
    wire: slice


class Composite(Codec):
    """Different codecs for consecutive parts of one vector, in one pass around the ring.

    Linear only if every part is; otherwise linear parts are encoded and added at each hop like the others.

    Args:
        parts: (length, codec) of each part, in the order of the vector.
    """

    def __init__(self, parts: Sequence[tuple[int, Codec]]) -> None:
        self.parts = tuple(parts)
        self.linear = all(codec.linear for _, codec in self.parts)
        self._offsets = (0, *accumulate(length for length, _ in self.parts))
        self._kept: dict[tuple[int, int, np.dtype[Any]], list[_Piece]] = {}

    def describe(self, dtype: np.dtype[Any]) -> str:
        return " + ".join(f"{length} {codec.describe(dtype)}" for length, codec in self.parts)

    def regions(self, length: int, dtype: np.dtype[Any]) -> Sequence[Region]:
        if length != self._offsets[-1]:
            raise ValueError(f"the parts of this codec cover {self._offsets[-1]} elements, the vector has {length}")
        return [region for part, codec in self.parts for region in codec.regions(part, dtype)]

    def _pieces(self, values: Array, start: int) -> list[_Piece]:
        """The pieces of a chunk, one for each part that it touches; kept, as chunks come back in every call."""
        key = (start, len(values), values.dtype)
        pieces = self._kept.get(key)
        if pieces is None:
            pieces = self._kept[key] = []
            stop, taken = start + len(values), 0
            for (length, codec), offset in zip(self.parts, self._offsets, strict=False):
                first, last = max(start, offset), min(stop, offset + length)
                if first < last:
                    part = PayloadMap(codec.regions(length, values.dtype))
                    num_bytes = part.byte_at(last - offset) - part.byte_at(first - offset)
                    elements, wire = slice(first - start, last - start), slice(taken, taken + num_bytes)
                    pieces.append(_Piece(codec, elements, first - offset, wire))
                    taken += num_bytes
        return pieces

    def encode(self, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        for codec, elements, offset, wire in self._pieces(values, start):
            codec.encode(values[elements], offset, payload[wire], hop)

    def reduce(self, incoming: Payload, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        for codec, elements, offset, wire in self._pieces(values, start):
            if codec.linear and not self.linear:
                codec.encode(values[elements], offset, payload[wire], hop)
            codec.reduce(incoming[wire], values[elements], offset, payload[wire], hop)

    def decode(self, payload: Payload, start: int, values: Array, size: int) -> None:
        for codec, elements, offset, wire in self._pieces(values, start):
            codec.decode(payload[wire], offset, values[elements], size)

    def amounts(self, kind: str, values: Array, start: int, payload: Payload) -> Sequence[tuple[str, float]]:
        total: dict[str, float] = {}
        for codec, elements, offset, wire in self._pieces(values, start):
            for part in ("encode", "add") if kind == "recode" and codec.linear else (kind,):
                for name, amount in codec.amounts(part, values[elements], offset, payload[wire]):
                    total[name] = total.get(name, 0.0) + amount
        return list(total.items())
