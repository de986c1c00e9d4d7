"""Gradients on a device: encoded and decoded there, and summed by a ring that works in host memory.

    device    pack    encode piece by piece                          decode piece by piece    unpack
                          | copy, piece by piece                         ^ copy, chunk by chunk
    host                  v                                              |
              ring, chunk by chunk:  wait for the pieces it needs,  add,  pass on,  done ------+

What travels is a vector of float32 in pinned host memory: the gradient itself (`Plain`), or GradiVeQ's payload, an
eighth of it or so, whose sum is the sum's payload as the codec is linear. Either way the ring adds plain floats, so
segments are equal without further ado. Pieces are encoded in the order in which the ring will want them, this rank's
segment first. The copy of one overlaps the encoding of the next, and both overlap the ring; so do the copies back and
the decoding.

Sums of `Plain` are the same bits as by the host's path, because the same chunks are added in the same order. GradiVeQ's
differ by rounding: each float of the payload is a dot product of K terms, added in another order than on the host and
so off by at most about K·2⁻²⁴·Σ|u·x| (TF32 products, off by default in PyTorch, would make that 2⁻¹¹), decoding by the
same with d. All ranks decode the same payload with the same bases, so replicas stay the same bits, on cards of one kind
with one version of the libraries.

On the CPU all of this runs as it does on a GPU, with copies that are done at once (`Lane`).

**What stays on the host.** Compressors and PowerSGD get the gradient by one copy, and their mean goes back by one; so
does QSGD in small chunks and without Triton. In large ones it is quantised on the device, by a fused kernel
(`gradiveq.over_ring.staged_qsgd`). GradiVeQ needs none: its product takes the subtraction of Uᵀµ along.

**GPU-aware MPI** takes pointers to a device's memory. Then the payload isn't copied at all: MPI's own all-reduce adds
it (`ring.mpi.MPIRing.all_reduce_directly`). Its order of additions is MPI's.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gradiveq.device.host_copy import HostCopy
from gradiveq.flatten import Block, Vector
from gradiveq.pca.coding import Bases
from gradiveq.pca.projection import Projection, squares
from ring.codec import Array, Codec, Hop, IdentityCodec, Payload
from ring.handle import Ring
from ring.plan import Stats
from ring.timeline import Timeline


class Mark(Protocol):
    """A copy to the host that has begun; `torch.cuda.Event` is one."""

    def synchronize(self) -> None:
        """Wait until it is done."""


class _Done:
    """A copy that was done at once."""

    def synchronize(self) -> None:
        return


class Lane:
    """Copies between a device and the host, in order, beside what the device computes. All that knows of streams.

    Args:
        device: a GPU; or the CPU, where a copy is done before its method returns.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_memory(self, length: int) -> Tensor:
        """float32 of shape (length,) that copies need not wait for: pinned, if there is a GPU."""
        return torch.empty(length, dtype=torch.float32, device="cpu", pin_memory=self._stream is not None)

    def fetch(self, host: Tensor, source: Tensor) -> Mark:
        """Begin to copy to the host what `source` is once all is computed that has been asked for until now."""
        if self._stream is None:
            host.copy_(source)
            return _Done()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            host.copy_(source, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # is waited for without spinning
        event.record(self._stream)
        return event

    def push(self, target: Tensor, host: Tensor) -> None:
        """Begin to copy to the device, after the copies before. Nothing that is still to be computed may need what was
        in `target`, but for fetches that have begun."""
        if self._stream is None:
            target.copy_(host)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(host, non_blocking=True)

    def join(self) -> None:
        """What is asked for from now on is computed after all copies that have begun."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def settle(self) -> None:
        """Wait until all is computed that has been asked for."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).synchronize()


class Piece(NamedTuple):
    """A stretch of what travels.

    Attributes:
        start, stop: its elements.
        encode: computes them on the device, if they aren't there anyway.
        decode: does with their mean what is to be done on the device, if anything.
        multiplications: that each of the two takes; for a cluster's rates.
    """

    start: int
    stop: int
    encode: Callable[[], object] | None = None
    decode: Callable[[], object] | None = None
    multiplications: int = 0


class Mirror:
    """A vector on a device and its counterpart in host memory, which everything that is copied shares.

    Args:
        length: of both.
        device: for the one.
        direct: MPI reads the device's memory (`ring.mpi.MPIRing.all_reduce_directly`).

    Attributes:
        values: float32 of shape (length,), on the device.
        host: float32 of shape (length,), in pinned memory. (Not memory that a neighbour on the same host could read, as
            `Ring.empty` gives: it would have to be pinned in place, by a call that has torch know nothing of it.)
    """

    def __init__(self, length: int, device: torch.device, *, direct: bool = False) -> None:
        self.device, self.direct = device, direct
        self.lane = Lane(device)
        self.values = torch.zeros(length, dtype=torch.float32, device=device)
        self.pinned = self.lane.host_memory(length)
        self.host: Vector = self.pinned.numpy()

    def to_host(self) -> None:
        """Copy all of `values`, and wait for it."""
        self.lane.fetch(self.pinned, self.values).synchronize()

    def to_device(self) -> None:
        """Copy all of `host`; what is computed from now on sees it."""
        self.lane.push(self.values, self.pinned)
        self.lane.join()


class OnDevice(Codec):
    """The mean over the workers of what is in a mirror."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of what travels, without the caller's elements."""

    @abstractmethod
    def mean_over(
        self, ring: Ring, controls: Sequence[float], chunk_bytes: int | None, timeline: Timeline
    ) -> tuple[Stats, list[float]]:
        """Replace it by the mean; collective.

        Args:
            controls: the caller's elements, which travel along.
            timeline: gets "encode" and "decode", beside what the ring's all-reduce gives it.
        Returns:
            What was sent, and the means of the caller's elements.
        """


class Staged(IdentityCodec, OnDevice):
    """The mean over the workers of a vector on a device, by way of pinned memory in which the ring works.

    As a codec of the ring it encodes nothing: `encode` waits until a chunk has been copied to the host, `decode` begins
    to copy a finished one back. The last elements are the caller's, and stay on the host.

    Args:
        mirror: whose host memory is used, from its beginning on.
        tensor: what travels, on the device: float32 of shape (length,), overwritten by the mean.
        pieces: that cover all of it but the caller's elements, in order.
        description: what ranks have to agree about.
    """

    staged = True

    def __init__(self, mirror: Mirror, tensor: Tensor, pieces: Sequence[Piece], description: str) -> None:
        self._lane, self._direct = mirror.lane, mirror.direct
        self._tensor, self._host = tensor, mirror.pinned[: len(tensor)]
        self._vector: Vector = mirror.host[: len(tensor)]
        self._pieces, self._description = tuple(pieces), description
        self._starts = [piece.start for piece in self._pieces]
        self._covered = self._pieces[-1].stop if self._pieces else 0
        # The call under way: copies to the host by piece, and elements of each that are not back.
        self._marks: list[Mark] = []
        self._missing: list[int] = []

    @property
    def num_bytes(self) -> int:
        return self._covered * self._tensor.itemsize

    def mean_over(
        self, ring: Ring, controls: Sequence[float], chunk_bytes: int | None, timeline: Timeline
    ) -> tuple[Stats, list[float]]:
        end = len(self._tensor) - len(controls)
        if self._direct:
            with timeline.span("encode"):
                for piece in self._pieces:
                    _call(piece.encode)
                self._tensor[end:] = torch.tensor(controls)
                self._lane.settle()
            stats = ring.all_reduce_directly(self._tensor, timeline=timeline)
            with timeline.span("decode"):
                self._tensor /= ring.size
                for piece in self._pieces:
                    _call(piece.decode)
                self._lane.settle()
            return stats, self._tensor[end:].tolist()
        with timeline.span("encode"):
            self._begin(ring)
        self._vector[end:] = controls
        with np.errstate(over="ignore", invalid="ignore"):  # looked for by the aggregator, on all ranks alike
            stats = ring.all_reduce(self._vector, self, op="mean", chunk_bytes=chunk_bytes, timeline=timeline)
        with timeline.span("decode"):
            self._lane.join()
            self._lane.settle()
        return stats, self._vector[end:].tolist()

    def _begin(self, ring: Ring) -> None:
        """Encode and copy the pieces, those of this rank's segment first, then of the one before, and so on."""
        self._marks = [_Done()] * len(self._pieces)
        self._missing = [piece.stop - piece.start for piece in self._pieces]

        def step(index: int) -> tuple[int, int]:
            segment = self._pieces[index].start * ring.size // len(self._tensor)
            return (ring.rank - segment) % ring.size, index

        for index in sorted(range(len(self._pieces)), key=step):
            piece = self._pieces[index]
            _call(piece.encode)
            where = slice(piece.start, piece.stop)
            self._marks[index] = self._lane.fetch(self._host[where], self._tensor[where])

    def describe(self, dtype: np.dtype[np.float32]) -> str:
        return f"staged {self._description}"

    def encode(self, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        for index in self._touched(start, start + len(values)):
            self._marks[index].synchronize()

    def decode(self, payload: Payload, start: int, values: Array, size: int) -> None:
        stop = min(start + len(values), self._covered)
        if start < stop:
            self._lane.push(self._tensor[start:stop], self._host[start:stop])
        for index in self._touched(start, stop):
            piece = self._pieces[index]
            self._missing[index] -= min(stop, piece.stop) - max(start, piece.start)
            if not self._missing[index] and piece.decode is not None:
                self._lane.join()
                piece.decode()

    def amounts(self, kind: str, values: Array, start: int, payload: Payload) -> Sequence[tuple[str, float]]:
        """Multiplications, as on the host; nothing for what is in place. A cluster is not told of copies."""
        if kind == "add":
            return super().amounts(kind, values, start, payload)
        stop = start + len(values)
        total = sum(
            piece.multiplications * (min(stop, piece.stop) - max(start, piece.start)) / (piece.stop - piece.start)
            for piece in (self._pieces[index] for index in self._touched(start, stop))
        )
        return [(f"pca.{kind}", total)] if total else []

    def _touched(self, start: int, stop: int) -> range:
        """The indices of the pieces with an element in the stretch."""
        if start >= min(stop, self._covered):
            return range(0)
        first = bisect_right(self._starts, start) - 1
        return range(first, bisect_right(self._starts, stop - 1))


def staged_plain(mirror: Mirror, length: int, chunk_bytes: int) -> Staged:
    """The gradient as it is: the first `length` elements of the mirror; what is behind them is the caller's."""
    cuts = range(0, length, max(1, chunk_bytes // 4))
    pieces = [Piece(start, min(start + cuts.step, length)) for start in cuts]
    return Staged(mirror, mirror.values, pieces, "identity")


class _Stretch(NamedTuple):
    """The places of a layer, or of what is between layers, in the gradient and in the payload, on the device.

    Attributes:
        name: of a layer that has a projection.
    """

    own: Tensor
    coded: Tensor
    name: str
    projection: Projection | None


class StagedLayers:
    """GradiVeQ's payload of the gradient in a mirror: some layers projected, the others as they are.

        | Uᵀ(g - µ) of layer 1 | ... | what is between | ... | caller's elements |

    Args:
        bases: of the layers to be compressed.
        trailing: the caller's elements.
        chunk_bytes: what is encoded and copied together, about.
        description: what ranks have to agree about, the bases above all.

    Attributes:
        staged: its mean over the workers.
    """

    def __init__(
        self,
        mirror: Mirror,
        blocks: Sequence[Block],
        bases: Bases,
        trailing: int,
        chunk_bytes: int,
        description: str,
    ) -> None:
        self._bases = bases
        most = max(1, chunk_bytes // 4)
        sizes = [*_runs(blocks, {name: bases.projection(name, mirror.device) for name in bases.by_name}, most)]
        floats = sum(length for _, length, _, _ in sizes) + trailing
        payload = torch.zeros(floats, dtype=torch.float32, device=mirror.device)
        pieces: list[Piece] = []
        together: list[_Stretch] = []
        start = stop = 0
        for own, length, name, projection in sizes:
            if together and stop + length - start > most:
                pieces.append(self._piece(start, stop, together))
                start, together = stop, []
            together.append(_Stretch(mirror.values[own], payload[stop : stop + length], name, projection))
            stop += length
        if together:
            pieces.append(self._piece(start, stop, together))
        self.staged = Staged(mirror, payload, pieces, description)

    def _piece(self, start: int, stop: int, parts: Sequence[_Stretch]) -> Piece:
        work = sum(part.projection.multiplications for part in parts if part.projection is not None)
        return Piece(start, stop, partial(self._encode, parts), partial(_decode, parts), work)

    def _encode(self, parts: Sequence[_Stretch]) -> None:
        for own, coded, name, projection in parts:
            if projection is None:
                coded.copy_(own)
                continue
            projection.encode(own, coded)
            if self._bases.monitor:
                self._bases.local[name] = HostCopy(squares(projection.decode(coded), own))


def _decode(parts: Sequence[_Stretch]) -> None:
    for own, coded, _, projection in parts:
        if projection is None:
            own.copy_(coded)
        else:
            projection.decode(coded, own)


def _runs(
    blocks: Sequence[Block], projections: Mapping[str, Projection], most: int
) -> Iterator[tuple[slice, int, str, Projection | None]]:
    """(elements of the gradient, floats of the payload, name, projection) of each layer that has one, and of what is
    between, in stretches of `most` elements."""
    start = 0
    stop = blocks[-1].stop if blocks else 0
    for block in [*(block for block in blocks if block.name in projections), None]:
        end = stop if block is None else block.start
        for first in range(start, end, most):
            last = min(first + most, end)
            yield slice(first, last), last - first, "", None
        if block is not None:
            projection = projections[block.name]
            yield block.where, projection.length, block.name, projection
            start = block.stop


def _call(function: Callable[[], object] | None) -> None:
    if function is not None:
        function()
